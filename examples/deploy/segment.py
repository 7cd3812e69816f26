"""Label every pixel with a file that `mila export` wrote; needs numpy, onnxruntime and pillow.

python segment.py MODEL.onnx IMAGE [OUT.png]
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

LONGEST = 2048  # of a side in pixels, unless the file was made at more: a panorama would take all memory


def read(file: str) -> Image.Image:
    """Read a picture, upright and as RGB; of 16 bits in grey the upper eight, as OpenCV does in training."""
    picture = ImageOps.exif_transpose(Image.open(file))
    if picture.mode.startswith('I'):  # convert would make all above 255 white
        picture = Image.fromarray((np.asarray(picture) // 256).clip(0, 255).astype(np.uint8))
    return picture.convert('RGB')


def main(model: str, file: str, out: str = 'labels.png') -> None:
    """Print the share of each class, and draw the labels over the image."""
    session = onnxruntime.InferenceSession(model, providers=['CPUExecutionProvider'])
    about = json.loads(session.get_modelmeta().custom_metadata_map['mila_mm'])
    picture = read(file)
    height, width = about['size']
    if about['any_multiple_of']:
        step, longest = about['any_multiple_of'], max(LONGEST, height, width)
        scale = min(min(height, width) / min(picture.size), longest / max(picture.size))
        sides = (round(x * scale / step) * step for x in (picture.height, picture.width))
        height, width = (max(side, about['smallest_side']) for side in sides)
    image = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
    labels = session.run(['labels'], {'image': np.stack([image] * about['batch'])})[0][0]
    labels = np.asarray(Image.fromarray(labels.astype(np.int32)).resize(picture.size, Image.Resampling.NEAREST))
    values, counts = np.unique(labels, return_counts=True)
    for i in np.argsort(-counts):
        name = about['classes'][values[i]] if about['classes'] else values[i]
        print(f'{name}: {100 * counts[i] / labels.size:.1f} %')
    colours = np.random.default_rng(0).integers(0, 256, (int(values.max()) + 1, 3))
    Image.fromarray((0.5 * np.asarray(picture) + 0.5 * colours[labels]).astype(np.uint8)).save(out)


if __name__ == '__main__':
    main(*sys.argv[1:])
