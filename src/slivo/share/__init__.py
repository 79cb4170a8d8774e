"""Weight sharing: weights that take few different values, and stay so while their values are trained."""

from slivo.share.cluster import share, shared
from slivo.share.codebook import INITS, kmeans, powers_of_two
from slivo.share.train import TrainValues, tied

__all__ = ["INITS", "TrainValues", "kmeans", "powers_of_two", "share", "shared", "tied"]
