"""Finding objects: detectors over any backbone, their anchors, and COCO's figures."""
