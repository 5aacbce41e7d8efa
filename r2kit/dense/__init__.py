"""Dense prediction: decoders over any backbone, the losses and metrics of maps, and large images read in tiles."""
