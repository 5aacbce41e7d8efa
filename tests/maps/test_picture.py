import pytest
from matplotlib.colors import to_rgb

from r2kit.errors import DataError
from r2kit.maps import predict_map
from r2kit.maps.picture import map_figure


def test_a_map_is_drawn_beside_its_scene_with_its_classes(finished_run, make_scene, pixel_network, tmp_path):
    pixel_network((64, 64))
    scene = make_scene(150, 200, nodata=0)
    path = predict_map(finished_run, scene, tmp_path / "map.tif")
    figure = map_figure(path, scene)
    left, right = figure.axes
    assert left.get_title() == "scene"
    shown = right.images[0]
    assert tuple(shown.get_extent()) == (500_000.0, 502_000.0, 4_598_500.0, 4_600_000.0)
    assert shown.get_array().mask[10:50, 20:90].all()  # nothing is known there
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["field", "sand", "water"]
    assert [shown.cmap(shown.norm(k))[:3] for k in range(3)] == [
        to_rgb(p.get_facecolor()) for p in legend.get_patches()
    ]
    assert len(map_figure(path).axes) == 1
    painted = map_figure(path, colours={"water": "tab:blue", "field": "green", "sand": "khaki"}).axes[0].images[0]
    assert painted.cmap(painted.norm(2))[:3] == to_rgb("tab:blue")
    with pytest.raises(DataError, match=r"colours: class 'sand' of .* has none; its classes are field, sand, water"):
        map_figure(path, colours={"water": "blue", "field": "green"})
    with pytest.raises(DataError, match="names no classes"):
        map_figure(scene)
