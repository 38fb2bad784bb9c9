"""A stand-in for the Hub, running before `huggingface_hub` is imported: the client reads its endpoint then."""

import os

from .server import Hub

HUB = Hub()
os.environ["HF_ENDPOINT"] = HUB.start()
os.environ["HF_HUB_DISABLE_XET"] = "1"
