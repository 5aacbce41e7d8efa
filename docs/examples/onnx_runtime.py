"""An exported classification with nothing but numpy, Pillow and ONNX Runtime.

    python onnx_runtime.py RUN/export IMAGE...

It checks the export against its golden pair, then classifies images. For another way of resizing see export.json.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

folder = Path(sys.argv[1])
about = json.loads((folder / "export.json").read_text())
session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])

expected = np.load(folder / "golden_output.npy")
(found,) = session.run(None, {"pixels": np.load(folder / "golden_input.npy")})
difference = float(np.abs(found - expected).max())
assert difference <= about["tolerance"], f"differs by {difference}"
print(f"golden pair: differs by {difference:.1e}")

# Classes and bands lie in the model itself, too.
inside = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
assert inside["r2kit.classes"] == about["classes"]
assert about["resize"] == "squash", "this example stretches images to the network's size"

height, width = about["size"]
for name in sys.argv[2:]:
    image = Image.open(name).convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1)[None]  # raw: normalisation is in the graph
    (probabilities,) = session.run(None, {"pixels": pixels})
    best = int(probabilities[0].argmax())
    print(f"{name}  {about['classes'][best]}  {probabilities[0, best]:.3f}")
