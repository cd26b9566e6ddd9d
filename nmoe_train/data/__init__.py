"""Data sets, their distribution among clients, and random views of images.

datasets     loads a data set by name and checks it
partition    how the classes are distributed among clients
clients      each client's training, held-out and test samples
views        random views of images (augmentation)
"""
