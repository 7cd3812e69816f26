"""Label every pixel with a file that `mila export` wrote; needs numpy, onnxruntime and pillow.

python segment.py MODEL.onnx IMAGE [OUT.png]
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def main(model, file, out='labels.png'):
    """Print the share of each class, and draw the labels over the image."""
    session = onnxruntime.InferenceSession(model, providers=['CPUExecutionProvider'])
    about = json.loads(session.get_modelmeta().custom_metadata_map['mila_mm'])
    picture = ImageOps.exif_transpose(Image.open(file)).convert('RGB')
    height, width = about['size']
    if about['any_multiple_of']:
        step, scale = about['any_multiple_of'], min(height, width) / min(picture.size)
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
