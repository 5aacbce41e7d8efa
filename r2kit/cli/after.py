"""Commands that take the folder of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from r2kit.cli.options import BatchSize, Device, RunArgument, Tta, Workers
from r2kit.errors import R2kitError


def evaluate(
    run: RunArgument,
    data: Annotated[
        Path | None, typer.Option(help="Another folder with the same classes; default: the run's held-out images.")
    ] = None,
    split: Annotated[str, typer.Option(help="auto (test if there is one), val or test.")] = "auto",
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    device: Device = "auto",
    tta: Tta = False,
) -> None:
    """Measure a run on its held-out images, each number with an interval."""
    from r2kit.console import make_console, quiet_libraries
    from r2kit.evaluate import evaluate as measure
    from r2kit.evaluate import summary_lines
    from r2kit.run import Run

    quiet_libraries()
    opened = Run.open(run)
    metrics = measure(
        opened,
        data=None if data is None else str(data),
        split=split,
        batch_size=batch_size,
        workers=workers,
        device=device,
        tta=tta,
    )
    console = make_console()
    for line in summary_lines(metrics):
        console.print(line)


def predict(
    run: RunArgument,
    paths: Annotated[list[Path], typer.Argument(metavar="PATHS", help="Image files, folders; rasters for a map.")],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Table to write (CSV and more), or MAP.tif, or a folder of maps or of masks."),
    ] = Path("predictions.csv"),
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    device: Device = "auto",
    tta: Tta = False,
    engine: Annotated[
        str, typer.Option(help="local, or ray: a cluster of machines, one GPU or core for each piece of the work.")
    ] = "local",
    as_map: Annotated[
        bool, typer.Option("--map", help="Map whole scenes; follows from an --out ending in .tif.")
    ] = False,
    cell: Annotated[
        int | None, typer.Option(help="Map of a classification: pixels of the scene for each cell; default a tile.")
    ] = None,
    tile: Annotated[
        int | None, typer.Option(help="Map of a segmentation: side of a tile in pixels; default as in training.")
    ] = None,
    overlap: Annotated[
        float | None, typer.Option(help="Map of a segmentation: share of a tile that neighbours share; default 0.25.")
    ] = None,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Map: a band for each class as well.")] = False,
    vector: Annotated[str | None, typer.Option(help="Map: polygons beside it, geojson or gpkg.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Map: replace one made with other settings.")] = False,
) -> None:
    """Predict image files: classes, masks, or the objects in them; or map whole scenes of any size."""
    from r2kit.console import make_console, quiet_libraries
    from r2kit.run import Run

    quiet_libraries()
    opened, console = Run.open(run), make_console()
    of_maps = {"--cell": cell, "--tile": tile, "--overlap": overlap, "--vector": vector}
    if engine not in ("local", "ray"):
        raise R2kitError(f"--engine: got '{engine}', allowed are local and ray")
    given = [name for name, value in of_maps.items() if value is not None]
    given += ["--probabilities"] * probabilities + ["--overwrite"] * overwrite
    if as_map or out.suffix.lower() in (".tif", ".tiff"):
        from r2kit.maps import OVERLAP, MapSettings, predict_maps

        settings = MapSettings(
            tile=None if tile is None else (tile, tile),
            overlap=OVERLAP if overlap is None else overlap,
            cell=cell,
            probabilities=probabilities,
            tta=tta,
            workers=workers,
            device=device,
            vector=vector,
            overwrite=overwrite,
        )
        if engine == "ray":
            from r2kit.cluster import predict_scenes

            for written in predict_scenes(opened, paths, out, settings, console=console):
                console.print(f"written: {written}")
            return
        predict_maps(opened, paths, out, settings, console=console)
        return
    if given:
        raise R2kitError(f"{given[0]}: is for maps; give an --out that ends in .tif, or --map with a folder")
    if engine == "ray":
        from r2kit.cluster import predict_table

        found = predict_table(opened, paths, out, batch_size=batch_size, device=device, tta=tta, console=console)
    else:
        from r2kit.predict import predict as run_predict

        found = run_predict(opened, paths, out=out, batch_size=batch_size, workers=workers, device=device, tta=tta)
    if not {"confidence", "score"} & set(found):  # masks: a folder
        for row in found.head(10).itertuples():
            console.print(f"{row.path}  {row.mask}")
        if len(found) > 10:
            console.print(f"and {len(found) - 10} more")
        console.print(f"written: {found.attrs['written']}")
        return
    for row in found.head(10).itertuples():
        console.print(f"{row.path}  {row[2]}  {row[3]:.3f}")
    if len(found) > 10:
        console.print(f"and {len(found) - 10} more")
    console.print(f"written: {found.attrs['written']}")


def report(run: RunArgument) -> None:
    """Write the run's report.html and model_card.md anew."""
    from r2kit.console import quiet_libraries
    from r2kit.report import write_report
    from r2kit.run import Run

    quiet_libraries()
    typer.echo(write_report(Run.open(run)))


def demo(
    run: RunArgument,
    scene: Annotated[Path | None, typer.Option(help="A GeoTIFF to click on.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to serve on; anything but the default lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    device: Device = "auto",
) -> None:
    """Serve a small local page: drop an image or click on a scene, and see the answer and the evidence for it."""
    from r2kit.console import make_console, quiet_libraries
    from r2kit.demo import Demo, is_loopback, make_server
    from r2kit.run import Run

    quiet_libraries()
    server = make_server(Demo(Run.open(run), scene, device=device), host, port)
    console = make_console()
    if not is_loopback(host):
        console.print(f"note: --host {host} lets every machine that reaches it ask; there is no password")
    shown = f"[{host}]" if ":" in host else host
    console.print(f"http://{shown}:{server.server_address[1]}/  (Ctrl-C ends it)")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


def push(
    run: RunArgument,
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="A repository of the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private if it is made.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files and send nothing.")] = False,
) -> None:
    """Upload weights, recipe, model card and report to the Hugging Face hub."""
    from r2kit.console import make_console, quiet_libraries
    from r2kit.push import push as upload
    from r2kit.run import Run

    quiet_libraries()
    files = upload(Run.open(run), repo, private=private, dry_run=dry_run)
    console = make_console()
    for name, size in files:
        console.print(f"{name}  {size:,} bytes")
    console.print("dry run: nothing was sent" if dry_run else f"pushed: https://huggingface.co/{repo}")


def explain(
    run: RunArgument,
    images: Annotated[
        list[Path] | None, typer.Argument(metavar="IMAGES", help="Files, folders; default: some held-out images.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="gradcam, hirescam, guided-gradcam, integrated-gradients or occlusion; default gradcam, hirescam for "
            "a detection."
        ),
    ] = None,
    target: Annotated[str | None, typer.Option(help="The class; default: what the run answers for each image.")] = None,
    against: Annotated[Path | None, typer.Option(metavar="RUN2", help="Another run, to be shown beside.")] = None,
    masks: Annotated[Path | None, typer.Option(help="Folder with a mask for each image: not 0 is the object.")] = None,
    bands: Annotated[
        str | None, typer.Option(help="One band or three to show, by name or position, e.g. nir,red,green.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Held-out images at most.")] = 12,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder; default explain in the run's folder.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Show which part of an image speaks for a class, beside another run if asked; works for every task."""
    from r2kit.console import make_console, quiet_libraries
    from r2kit.explain import explain as run_explain
    from r2kit.run import Run

    quiet_libraries()
    shown = None if bands is None else [int(b) if b.isdigit() else b for b in (b.strip() for b in bands.split(","))]
    found = run_explain(
        Run.open(run),
        images or [],
        method=method,
        target=target,
        against=None if against is None else Run.open(against),
        masks=masks,
        bands=shown,
        limit=limit,
        out=out,
        device=device,
    )
    console = make_console()
    for sentence in found.sentences:
        console.print(sentence)
    console.print(f"written: {found.folder}, with index.html")


def export(
    run: RunArgument,
    to: Annotated[
        str, typer.Option(help="Formats, separated by commas: onnx, torch-export, openvino, coreml.")
    ] = "onnx",
    precision: Annotated[
        str, typer.Option(help="fp32, fp16, int8, separated by commas; what the last two lose is measured.")
    ] = "fp32",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder; default export in the run's folder.")] = None,
) -> None:
    """Write the network for other programs, each file checked against PyTorch on real images."""
    from r2kit.console import make_console, quiet_libraries, table
    from r2kit.export import export as write_exports
    from r2kit.run import Run

    quiet_libraries()
    opened = Run.open(run)
    formats, precisions = ([name.strip() for name in given.split(",")] for given in (to, precision))
    made = write_exports(opened, formats, precisions, out=out)
    batches = sorted({batch for one in made for batch in one.milliseconds})
    rows = [
        [
            one.format,
            one.precision,
            one.file,
            "not run here" if one.difference is None else f"{one.difference:.1e}",
            "none" if one.precision == "fp32" else "not measured" if one.loss is None else one.loss.words(),
            one.megabytes,
            *(f"{one.milliseconds[batch]:.1f}" if batch in one.milliseconds else "-" for batch in batches),
        ]
        for one in made
    ]
    columns = ["format", "precision", "file", "largest difference", "lost", "MB", *(f"ms, batch {n}" for n in batches)]
    console = make_console()
    console.print(table("against PyTorch, on this CPU", columns, rows, numbers_from=3))
    judged = next((one.loss for one in made if one.loss is not None), None)
    if judged is not None:
        console.print(
            f"lost: {judged.figure} on {judged.images} {judged.split} images, where PyTorch has "
            f"{100 * judged.pytorch:.1f} %; in brackets the 95 % interval, paired over these images"
        )
    if any(one.difference is None for one in made):
        console.print("CoreML runs on macOS alone: what was written here is not compared with PyTorch")
    console.print(f"written: {out or opened.path / 'export'}, with export.json and a golden pair of images and answers")


def area(
    map_file: Annotated[Path, typer.Argument(metavar="MAP", help="A map that r2kit predict made.")],
    sample: Annotated[Path, typer.Argument(metavar="SAMPLE", help="CSV or Parquet: reference, and lon, lat or x, y.")],
    design: Annotated[
        str | None, typer.Option(help="How the points were drawn: stratified, simple or systematic; must be given.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write the figures as JSON.")] = None,
) -> None:
    """Estimate the area of each class from a map and a probability sample of reference labels."""
    from r2kit.area import estimate_areas, write_area_report
    from r2kit.console import make_console, table

    found = estimate_areas(map_file, sample, design)
    console = make_console()

    def words(estimate: object, factor: float = 100.0) -> str:
        value, low, high = (factor * getattr(estimate, end) for end in ("value", "low", "high"))
        return f"{value:,.1f} ({low:,.1f} to {high:,.1f})"

    rows = [
        [
            row.name,
            f"{row.mapped * found.total_area:,.1f}",
            words(row.share, found.total_area),
            words(row.users),
            words(row.producers),
            row.sampled,
        ]
        for row in found.classes
    ]
    columns = ["class", f"mapped ({found.unit})", f"area ({found.unit})", "user's %", "producer's %", "points"]
    console.print(table(f"{100 * found.level:.0f} % intervals, {found.points} points, {found.design}", columns, rows))
    console.print(f"overall accuracy {words(found.overall)} %")
    for note in found.notes:
        console.print(f"note: {note}")
    if out is not None:
        write_area_report(found, out)
        console.print(f"written: {out}")
