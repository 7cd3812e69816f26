"""Find objects and their masks with a file that `mila export` wrote; needs numpy, onnxruntime and pillow.

python detect.py MODEL.onnx IMAGE [OUT.png]
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

THRESHOLD = 0.3


def fit(picture, about):
    """Resize into the file's size, keeping the aspect; returns the padded image, its content and the scale."""
    height, width = about['size']
    scale = min(height / picture.height, width / picture.width)
    content = round(picture.height * scale), round(picture.width * scale)
    if about['any_multiple_of']:
        height, width = (max(-(-x // about['any_multiple_of']), 2) * about['any_multiple_of'] for x in content)
    image = np.zeros((height, width, 3), np.uint8)
    image[: content[0], : content[1]] = picture.resize(content[::-1], Image.Resampling.BILINEAR)
    return image, content, scale


def paste(mask, box, height, width):
    """Sample the probabilities over a box at every pixel of an image; 0 outside."""
    side = len(mask) - 1
    padded = np.pad(mask, 1)
    x = ((np.arange(width) + 0.5 - box[0]) / max(box[2] - box[0], 1e-6) * (side + 1) + 0.5).clip(0, side + 2)
    y = ((np.arange(height) + 0.5 - box[1]) / max(box[3] - box[1], 1e-6) * (side + 1) + 0.5).clip(0, side + 2)
    left, top = (np.minimum(v.astype(int), side + 1) for v in (x, y))
    across, down = x - left, (y - top)[:, None]
    rows = padded[:, left] * (1 - across) + padded[:, left + 1] * across
    return rows[top] * (1 - down) + rows[top + 1] * down


def main(model, file, out='detections.png'):
    """Print what is found, and draw the masks."""
    session = onnxruntime.InferenceSession(model, providers=['CPUExecutionProvider'])
    about = json.loads(session.get_modelmeta().custom_metadata_map['mila_mm'])
    picture = Image.open(file).convert('RGB')
    image, content, scale = fit(picture, about)
    inputs = {'image': np.stack([image] * about['batch']), 'size': np.array([content] * about['batch'])}
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(None, inputs), strict=True))
    drawn = np.asarray(picture).astype(float)
    for i in range(found['count'][0]):
        score, label, box = found['scores'][0, i], found['labels'][0, i], found['boxes'][0, i] / scale
        if score < THRESHOLD:
            break
        print(about['classes'][label] if about['classes'] else label, f'{score:.3f}', *(f'{x:.1f}' for x in box))
        if 'masks' in found:
            mask = paste(found['masks'][0, i], box, picture.height, picture.width) >= about['mask_threshold']
            drawn[mask] = 0.5 * drawn[mask] + 0.5 * np.random.default_rng(label).uniform(0, 255, 3)
    Image.fromarray(drawn.astype(np.uint8)).save(out)


if __name__ == '__main__':
    main(*sys.argv[1:])
