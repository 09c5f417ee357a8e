"""Preparation: fetches the images that rows name by URL, and writes conversations that hold them.

Beside `hub/` the one place that uses the network, and the only one that goes where data from elsewhere points to.
"""

from theworld_train.preparation.download import Downloader, Limits
from theworld_train.preparation.run import Report, Settings, prepare

__all__ = ["Downloader", "Limits", "Report", "Settings", "prepare"]
