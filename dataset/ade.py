"""ade: ADE20K of the scene parsing challenge 2016, 150 classes and 0 (20,210 training, 2,000 validation images).

DATA_ROOT/ADEChallengeData2016/images/{training,validation}/*.jpg
                               annotations/{training,validation}/*.png
"""

from __future__ import annotations

from pathlib import Path

from dataset.layout import FilePair, Layout, list_images


class Ade(Layout):
    """See the module."""

    name = "ade"
    hint = "scripts/prepare_ade.py unpacks ADEChallengeData2016.zip of sceneparsing.csail.mit.edu under --data_root"
    split_names = ("training", "validation")
    classes = (
        "background", "wall", "building", "sky", "floor", "tree", "ceiling", "road", "bed", "windowpane", "grass",
        "cabinet", "sidewalk", "person", "earth", "door", "table", "mountain", "plant", "curtain", "chair", "car",
        "water", "painting", "sofa", "shelf", "house", "sea", "mirror", "rug", "field", "armchair", "seat", "fence",
        "desk", "rock", "wardrobe", "lamp", "bathtub", "railing", "cushion", "base", "box", "column", "signboard",
        "chest of drawers", "counter", "sand", "sink", "skyscraper", "fireplace", "refrigerator", "grandstand", "path",
        "stairs", "runway", "case", "pool table", "pillow", "screen door", "stairway", "river", "bridge", "bookcase",
        "blind", "coffee table", "toilet", "flower", "book", "hill", "bench", "countertop", "stove", "palm",
        "kitchen island", "computer", "swivel chair", "boat", "bar", "arcade machine", "hovel", "bus", "towel", "light",
        "truck", "tower", "chandelier", "awning", "streetlight", "booth", "television receiver", "airplane",
        "dirt track", "apparel", "pole", "land", "bannister", "escalator", "ottoman", "bottle", "buffet", "poster",
        "stage", "van", "ship", "fountain", "conveyer belt", "canopy", "washer", "plaything", "swimming pool", "stool",
        "barrel", "basket", "waterfall", "tent", "bag", "minibike", "cradle", "oven", "ball", "food", "step", "tank",
        "trade name", "microwave", "pot", "animal", "bicycle", "lake", "dishwasher", "screen", "blanket", "sculpture",
        "hood", "sconce", "vase", "traffic light", "tray", "ashcan", "fan", "pier", "crt screen", "plate", "monitor",
        "bulletin board", "shower", "radiator", "glass", "clock", "flag",
    )  # fmt: skip

    def pairs(self, root: Path, train: bool) -> list[FilePair]:
        """Every image of the folder of the split, with the annotation of the same name."""
        base, split = root / "ADEChallengeData2016", self.split_names[0 if train else 1]
        images = list_images(base / "images" / split, self.hint)
        folders = base / "images" / split, base / "annotations" / split
        return [FilePair(str(folders[0] / name), str(folders[1] / f"{stem}.png")) for stem, name in images.items()]
