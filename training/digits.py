"""The digits of scikit-learn as a tensorflow-datasets builder."""

import numpy as np
import tensorflow_datasets as tfds

TEST_SIZE = 360


class HandwrittenDigits(tfds.core.GeneratorBasedBuilder):
    """1,797 grey images of 8 x 8 pixels, 0 to 9, that come with scikit-learn.

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI
    Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49 (its test part).
    The 360 test images were drawn once, at random, from all.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return self.dataset_info_from_configs(
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1)),
                    "label": tfds.features.ClassLabel(names=list("0123456789")),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {
            split: self._generate_examples(images, labels)
            for split, (images, labels) in read_digits().items()
        }

    def _generate_examples(self, images, labels):
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield i, {"image": image[..., None], "label": int(label)}


def read_digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Split the digits in `"train"` and `"test"`, 1,437 and 360 of them.

    Returns:
        For each split the images, uint8 `(N, 8, 8)` of 0..255, and the digits `(N,)`.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype("uint8")
    order = np.random.RandomState(0).permutation(len(images))
    test, train = np.split(order, [TEST_SIZE])
    return {
        split: (images[rows], digits.target[rows])
        for split, rows in (("train", train), ("test", test))
    }
