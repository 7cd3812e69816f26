"""Find objects and their masks with a file that `mila export` wrote; needs numpy, onnxruntime and pillow.

python detect.py MODEL.onnx IMAGE [OUT.png]
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

THRESHOLD = 0.3


def read(file: str) -> Image.Image:
    """Read a picture, upright and as RGB; of 16 bits in grey the upper eight, as OpenCV does in training."""
    picture = ImageOps.exif_transpose(Image.open(file))
    if picture.mode.startswith('I'):  # convert would make all above 255 white
        picture = Image.fromarray((np.asarray(picture) // 256).clip(0, 255).astype(np.uint8))
    return picture.convert('RGB')


def paste(mask: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Sample the probabilities over a box at every pixel of an image of a width and height; 0 outside."""
    step = len(mask) / np.maximum(box[2:] - box[:2], 1e-6)
    start = 1 - box[:2] * step  # behind the border of zeros that the mask gets
    matrix = step[0], 0, start[0], 0, step[1], start[1]
    return Image.fromarray(np.pad(mask, 1)).transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def main(model: str, file: str, out: str = 'detections.png') -> None:
    """Print what is found, and draw the masks."""
    session = onnxruntime.InferenceSession(model, providers=['CPUExecutionProvider'])
    about = json.loads(session.get_modelmeta().custom_metadata_map['mila_mm'])
    picture = read(file)
    height, width = about['size']
    scale = min(height / picture.height, width / picture.width)
    content = [max(round(side * scale), 1) for side in (picture.height, picture.width)]
    scales = np.divide(content[::-1] * 2, picture.size * 2)  # of x, y, x, y: content has whole pixels
    if step := about['any_multiple_of']:
        height, width = (max(-(-side // step) * step, about['smallest_side']) for side in content)
    image = np.zeros((about['batch'], height, width, 3), np.uint8)
    image[:, : content[0], : content[1]] = picture.resize(content[::-1], Image.Resampling.BILINEAR)
    inputs = {'image': image, 'size': np.array([content] * about['batch'], np.int64)}
    names = [output.name for output in session.get_outputs()]
    found = {name: x[0] for name, x in zip(names, session.run(None, inputs), strict=True)}
    drawn = np.asarray(picture).astype(float)
    for i in range(found['count']):
        score, label, box = found['scores'][i], found['labels'][i], found['boxes'][i] / scales
        if score < THRESHOLD:
            break
        print(about['classes'][label] if about['classes'] else label, f'{score:.3f}', *(f'{x:.1f}' for x in box))
        if 'masks' in found:
            mask = found['masks'][i]
            if mask.dtype == bool:  # --masks image: over the whole input
                whole = Image.fromarray(mask[: content[0], : content[1]])
                mask = np.asarray(whole.resize(picture.size, Image.Resampling.NEAREST))
            else:
                mask = np.asarray(paste(mask, box, picture.size)) >= about['mask_threshold']
            drawn[mask] = 0.5 * drawn[mask] + 0.5 * np.random.default_rng(label).uniform(0, 255, 3)
    Image.fromarray(drawn.astype(np.uint8)).save(out)


if __name__ == '__main__':
    main(*sys.argv[1:])
