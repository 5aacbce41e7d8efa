"""Maps: a trained network over whole scenes, of any size, in bounded memory."""

from r2kit.maps.engine import OVERLAP, MapSettings, predict_map, predict_maps

__all__ = ["OVERLAP", "MapSettings", "predict_map", "predict_maps"]
