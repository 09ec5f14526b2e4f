"""Which columns of a batch lie in the coordinates of its images, and so have to move with them."""

import re

# Columns of images with objects, under the names of TFDS; PRESENT is our own.
BOXES = "objects/bbox"  # ymin, xmin, ymax, xmax as fractions of the image, [N, 4] of each image
LABELS = "objects/label"  # the classes of the boxes
PRESENT = "objects/mask"  # which of N are boxes, where images are padded to N
MAP = "segmentation_mask"  # a label of each pixel
# Words in the names of columns with image coordinates, as in TFDS: "objects/bbox", "keypoints_2d".
PLACES = re.compile(r"[a-z]*box(es)?|(coord(inate)?|corner|keypoint|landmark|point|polygon)s?|joints|xywh|xyxy|cxcywh")
# Words in the names of columns with a value for each pixel, where they have two axes or more beside the batch's.
MAPS = re.compile(r"(depth|flow|heatmap|image|label|mask|segmentation)s?|disparity|normals|saliency")
TOKENS = {"attention", "attn", "causal", "padding"}  # a mask with one of these words in its name is one of tokens


def lies_in_the_image(name: str, axes: int) -> bool:
    """Whether a column of this name holds places in the image, or a value for each pixel, the batch's axis included.

    It does where its name contains a word of PLACES, or a word of MAPS and it has two or more axes beside the batch's.
    Shapes do not decide: 8x8 features are no map of an 8x8 image, and a depth map may have half the image's size.
    """
    words = {word.lower() for word in re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+", name)}
    maps = words - {"mask", "masks"} if words & TOKENS else words
    return any(map(PLACES.fullmatch, words)) or (axes > 2 and any(map(MAPS.fullmatch, maps)))
