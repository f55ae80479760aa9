"""Real and rendered samples that the feeds are made of: photographs, text, captchas, files, speech.

`data` is always the folder DEST/data that fetch.py wrote. Everything comes out the same at every call: lists
of files are sorted and whatever is drawn at random has a seed.
"""

from __future__ import annotations

import csv
import importlib
import random
import re
import sys
import wave
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Floats = NDArray[np.float32]

WHITE = (255, 255, 255)
ALMOST_WHITE = 250  # grey value from which a pixel counts as background
CUTOUT_MARGIN = 1.1  # side of the square over the longer side of the subject
PHOTO_SIDE = 384  # pixels that the shorter side of a photograph is shrunk to
PHOTOGRAPHS = (
    "skimage/astronaut.png",
    "skimage/chelsea.png",
    "skimage/coffee.png",
    "skimage/motorcycle_left.png",
    "skimage/rocket.jpg",
    "sklearn/china.jpg",
    "sklearn/flower.jpg",
    "ultralytics/bus.jpg",
    "ultralytics/zidane.jpg",
)
LINE_FONTS = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf", "DejaVuSans-Bold.ttf")
LINE_SIZE = 28  # pixels
CAPTCHA_ALPHABET = list("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ")
TEXT_SUFFIXES = (
    ".c",
    ".cpp",
    ".css",
    ".csv",
    ".h",
    ".html",
    ".js",
    ".py",
    ".rst",
    ".sh",
    ".tsv",
    ".txt",
    ".xml",
    ".yaml",
)
BINARY_SUFFIXES = (".gif", ".gz", ".jpg", ".npy", ".png", ".tif", ".ttf", ".wav")
SMALLEST_FILE = 600  # bytes
SAMPLE_RATE = 16000  # hertz


def load_rgb(path: Path) -> Image.Image:
    """Open an image as RGB; what is transparent becomes white."""
    image: Image.Image = Image.open(path)
    if image.mode in ("RGBA", "LA", "P"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*WHITE, 255)), image)
    return image.convert("RGB")


def pixels(image: Image.Image) -> Floats:
    """Return height x width x channels, 0..255."""
    return np.asarray(image, np.float32)


def centre(image: Image.Image, width: int, height: int) -> Image.Image:
    """Cut a window out of the middle."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def squared_cutout(image: Image.Image) -> Image.Image:
    """Trim the white around a subject and put it into the middle of a white square."""
    subject = image.convert("L").point(lambda value: 255 if value < ALMOST_WHITE else 0).getbbox()
    image = image.crop(subject) if subject else image
    side = int(max(image.size) * CUTOUT_MARGIN)
    canvas = Image.new("RGB", (side, side), WHITE)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def imagenet_squares(data: Path) -> Iterator[Image.Image]:
    """Yield 20 ImageNet photos, then the 134 photo cut-outs of imagenet_cutouts.csv in its order."""
    for path in sorted((data / "foolbox").glob("imagenet_*.jpg")):
        photo = load_rgb(path)
        yield centre(photo, min(photo.size), min(photo.size))
    with Path(__file__).with_name("imagenet_cutouts.csv").open(encoding="utf-8", newline="") as table:
        for row in csv.DictReader(table):
            yield squared_cutout(load_rgb(data / "stamps" / row["image"]))


def photo_windows(data: Path, side: int) -> Iterator[Image.Image]:
    """Yield the middle, side x side, of every photograph that is large enough."""
    paths = [data / name for name in PHOTOGRAPHS] + sorted((data / "foolbox").glob("imagenet_*.jpg"))
    for path in paths:
        photo = load_rgb(path)
        shrink = max(1.0, min(photo.size) / PHOTO_SIDE)
        size = int(photo.width / shrink), int(photo.height / shrink)
        if min(size) >= side:
            yield centre(photo.resize(size, Image.Resampling.LANCZOS), side, side)


def face_crops(data: Path) -> Iterator[Image.Image]:
    """Yield 100 faces, then 100 crops of other things, all of 25 x 25 pixels."""
    for crop in np.load(data / "skimage" / "lfw_subset.npy"):
        yield Image.fromarray((crop * 255).astype(np.uint8)).convert("RGB")


@cache
def words(data: Path) -> list[str]:
    """Return running text as lower-case words of 3 to 9 letters."""
    text = (data / "gensim" / "lee_background.cor").read_text(encoding="latin-1")
    return re.findall(r"[a-z]{3,9}", text.lower())


def phrase(data: Path, count: int, seed: int) -> str:
    """Return `count` consecutive words."""
    start = np.random.RandomState(seed).randint(len(words(data)) - count)
    return " ".join(words(data)[start : start + count])


def text_line(data: Path, seed: int) -> Image.Image:
    """Render a line of text 44 pixels high, a little turned, blurred and noisy."""
    rng = np.random.RandomState(seed)
    text = phrase(data, rng.randint(2, 5), seed).capitalize()
    if seed % 3 == 0:
        text += f" {rng.randint(1, 9999)}"
    font = ImageFont.truetype(str(data / "fonts" / LINE_FONTS[seed % len(LINE_FONTS)]), LINE_SIZE)
    paper, ink = (int(rng.randint(200, 256)),) * 3, (int(rng.randint(0, 90)),) * 3
    image = Image.new("RGB", (int(font.getlength(text)) + 16, LINE_SIZE + 16), paper)
    ImageDraw.Draw(image).text((8, 4), text, font=font, fill=ink)
    image = image.rotate(rng.uniform(-1, 1), fillcolor=paper, resample=Image.Resampling.BILINEAR)
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.1)))
    noisy = pixels(image) + rng.normal(0, 8, (image.height, image.width, 1))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def text_page(data: Path, seed: int, width: int, height: int) -> Image.Image:
    """Render a page of separate lines in several sizes."""
    rng = np.random.RandomState(seed)
    image = Image.new("RGB", (width, height), (250, 250, 250))
    top = 40
    while top < height - 60:
        size = int(rng.choice([16, 18, 22, 30]))
        font = ImageFont.truetype(str(data / "fonts" / LINE_FONTS[seed % 2]), size)
        text = phrase(data, rng.randint(3, 7), seed * 1000 + top)
        while font.getlength(text) > width - 90:
            text = text.rsplit(" ", 1)[0]
        ImageDraw.Draw(image).text((int(rng.randint(36, 60)), top), text, font=font, fill=(20, 20, 20))
        top += size + int(rng.randint(18, 46))
    return image


class SeededSecrets:
    """Stand-in for the module `secrets`, which the captcha package draws from: the same draws every time."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self.randbelow, self.choice, self.randbits = rng.randrange, rng.choice, rng.getrandbits


def captchas(data: Path, count: int) -> Iterator[Image.Image]:
    """Yield captchas of four characters, 160 x 60."""
    sys.path.insert(0, str(data / "captcha"))
    try:
        module: Any = importlib.import_module("captcha.image")
    finally:
        sys.path.pop(0)
    module.secrets = SeededSecrets(0)
    rng = np.random.RandomState(0)
    generator = module.ImageCaptcha(160, 60)
    for _ in range(count):
        image = generator.generate_image("".join(rng.choice(CAPTCHA_ALPHABET, 4))).convert("RGB")
        yield image.resize((160, 60), Image.Resampling.BILINEAR)


def sentences(data: Path, count: int) -> list[str]:
    """Return the 50 news texts of Lee, then single sentences of his background texts, `count` in all."""
    folder = data / "gensim"
    texts = (folder / "lee.cor").read_text(encoding="latin-1").splitlines()
    background = (folder / "lee_background.cor").read_text(encoding="latin-1")
    singles = [text.strip() for text in re.split(r"\.\s", background) if len(text.split()) > 3]
    return [*(text for text in texts if text.strip()), *singles][:count]


def typed_files(folders: list[Path], per_type: int) -> Iterator[bytes]:
    """Yield the contents of up to `per_type` files of every suffix."""
    paths = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    for suffix in TEXT_SUFFIXES + BINARY_SUFFIXES:
        of_type = [path for path in paths if path.suffix == suffix and path.stat().st_size > SMALLEST_FILE]
        for path in of_type[:per_type]:
            yield path.read_bytes()


def load_wave(path: Path) -> Floats:
    """Return a recording as one channel at 16 kHz, -1..1 (linear interpolation)."""
    with wave.open(str(path)) as recording:
        frames = np.frombuffer(recording.readframes(recording.getnframes()), np.int16)
        rate, channels = recording.getframerate(), recording.getnchannels()
    signal: Floats = (frames.reshape(-1, channels).mean(1) / 32768).astype(np.float32)
    if rate == SAMPLE_RATE:
        return signal
    times = np.arange(0, len(signal) * SAMPLE_RATE / rate) * rate / SAMPLE_RATE
    resampled: Floats = np.interp(times, np.arange(len(signal)), signal).astype(np.float32)
    return resampled


def readings(data: Path) -> list[Path]:
    """Return ten recordings of read speech."""
    return sorted((data / "librivox").glob("*.wav")) + sorted((data / "cards").glob("*.wav"))


def speech_clips(data: Path) -> Iterator[Floats]:
    """Yield 16 clips of up to 6 s of speech and then 2 s of faint noise; one of them is a silence."""
    rng = np.random.RandomState(0)
    for path in readings(data) + sorted((data / "asterisk").rglob("*.wav"), key=lambda path: path.name):
        noise = rng.normal(0, 0.02, 2 * SAMPLE_RATE) * rng.uniform(0.05, 1)
        yield np.concatenate([load_wave(path)[: 6 * SAMPLE_RATE], noise.astype(np.float32)])
