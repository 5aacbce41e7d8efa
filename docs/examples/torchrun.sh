#!/bin/bash
# The same line on each of two machines with four GPUs each. HEAD is the name of one of them.
HEAD=${1:?usage: torchrun.sh NAME_OF_THE_FIRST_MACHINE}
torchrun --nnodes=2 --nproc-per-node=4 --rdzv-backend=c10d --rdzv-endpoint="$HEAD:29500" --rdzv-id=scenes \
    -m r2kit finetune recipe.yaml --out /shared/runs/scenes --resume auto train.strategy=ddp
