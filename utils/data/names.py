"""The data sets by name, for command lines, which do not wait for torch."""

WITH_FLAGS = ("cifar10", "cifar100", "mnist", "fashion-mnist", "kmnist", "digits")  # --cifar10, …
IN_FOLDERS = ("imagenet", "imagenet32")  # found in --data
DATASETS = WITH_FLAGS + IN_FOLDERS
BAD_IMAGES = ("error", "skip")  # what --bad-images does about unreadable image files
