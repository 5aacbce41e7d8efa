"""Warnings of fastai and its dependencies that say nothing about r2kit."""

import pytest

FASTAI = [
    # fastai 2.8 scripts four functions at import; torch 2.9 and newer warn of it.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    # fastai.tabular sets an option at import that pandas 3 no longer has.
    pytest.mark.filterwarnings("ignore:The 'mode.chained_assignment' option is deprecated"),
    # What load_learner says of every file.
    pytest.mark.filterwarnings("ignore:load_learner. uses Python's insecure pickle module"),
    # Learner.load allows numpy's scalars by the name they had before numpy 2.
    pytest.mark.filterwarnings("ignore:numpy.core is deprecated"),
    # torch's tensor subclasses, which matplotlib draws here, answer numpy's __array__ in the manner of numpy 1.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
    # show_results draws into a backend without a window.
    pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive"),
]
