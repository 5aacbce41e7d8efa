"""Maps: a trained network over whole scenes, of any size, in bounded memory."""

from r2kit.maps.engine import OVERLAP, MapSettings, map_files, predict_map, predict_maps, whole_scenes

__all__ = ["OVERLAP", "MapSettings", "map_files", "predict_map", "predict_maps", "whole_scenes"]
