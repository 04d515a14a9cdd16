"""The Fashion-MNIST classifier in Keras, as `tools/benchmark.py classifier` times it beside ours.

Runs in an environment of its own, where `pip install tensorflow-cpu` was done; needs nothing else.
Reads lines from standard input, trains on the images once for each, and answers with the seconds
of that epoch.

example:
  echo run | python tools/keras_classifier.py --arm gn_ws --batch-size 32 --images 3200
"""

import argparse
import os
import sys
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # type: ignore[import-not-found]
import numpy as np
from keras import layers, ops

GROUPS, EPS = 32, 1e-5


class EpochTime(keras.callbacks.Callback):
    """Seconds of the last epoch, without what `fit` does before and behind it."""

    seconds = 0.0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.seconds = -time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seconds += time.perf_counter()


class WSConv2D(layers.Conv2D):
    """Conv with standardized filters: deviation over all but the output channels, unbiased."""

    def call(self, inputs: Any) -> Any:
        mean = ops.mean(self.kernel, axis=(0, 1, 2), keepdims=True)
        centred = self.kernel - mean
        fan_in = int(np.prod(self.kernel.shape[:3]))
        variance = ops.sum(ops.square(centred), axis=(0, 1, 2), keepdims=True) / (fan_in - 1)
        weight = centred / (ops.sqrt(variance) + EPS)
        outputs = ops.conv(inputs, weight, strides=1, padding="same")
        return self.activation(outputs + self.bias)


def build(arm: str) -> Any:
    """The report's network: conv -> ReLU -> norm."""
    conv = WSConv2D if arm.endswith("_ws") else layers.Conv2D

    def norm() -> Any:
        return (
            layers.BatchNormalization()
            if arm.startswith("bn")
            else layers.GroupNormalization(GROUPS)
        )

    stack: list[Any] = [layers.Input((28, 28, 1))]
    for width in (32, 64):
        for _ in range(2):
            stack += [conv(width, 3, padding="same", activation="relu"), norm()]
        stack += [layers.MaxPooling2D(2), layers.Dropout(0.25)]
    stack += [layers.Flatten(), layers.Dense(512, activation="relu"), norm(), layers.Dropout(0.5)]
    stack += [layers.Dense(10, activation="softmax")]
    model = keras.Sequential(stack)
    model.compile(
        keras.optimizers.SGD(0.001, momentum=0.9, nesterov=True),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arm", choices=["bn", "gn", "bn_ws", "gn_ws"], required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--images", type=int, required=True, help="in a run")
    parser.add_argument("--threads", type=int, default=0, help="default: all")
    args = parser.parse_args()
    if keras.backend.backend() == "tensorflow":
        import tensorflow  # type: ignore[import-not-found]

        tensorflow.config.threading.set_intra_op_parallelism_threads(args.threads)
    keras.utils.set_random_seed(0)
    random = np.random.default_rng(0)  # speed does not depend on what the images show
    images = random.normal(size=(args.images, 28, 28, 1)).astype(np.float32)
    labels = random.integers(0, 10, args.images)
    model = build(args.arm)
    count = sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)
    version = f"keras {keras.__version__} on {keras.backend.backend()}"
    print(f"ready: {version}, {count} parameters", flush=True)
    timed = EpochTime()
    for _ in sys.stdin:
        model.fit(
            images, labels, batch_size=args.batch_size, epochs=1, verbose=0, callbacks=[timed]
        )
        print(timed.seconds, flush=True)


if __name__ == "__main__":
    main()
