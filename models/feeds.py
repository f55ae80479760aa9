"""Write real feeds for the models of the zoo, for calibration and for checks.

    pip install onnxruntime pillow tokenizers
    python models/feeds.py [NAME ...] [--zoo DIR]        after `python models/fetch.py [NAME ...]`

Every model gets two halves that share no feed:

    DEST/feeds/NAME/calibration/00012.npz ...      DEST/feeds/NAME/evaluation/00007.npz ...

One file is one feed: its arrays are named after the model's inputs, its number is the place of the sample in
the order of samples.py. The samples are put into a fixed random order first, because that order goes by kind.
States of recurrent nets and inputs of later nets of a chain are in the feeds as the float models make them.

Exit status: 0 all written, 1 something that is needed is missing, 2 the request is wrong.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fetch
import numpy as np
from catalogue import load_catalogue
from numpy.typing import NDArray

try:
    import onnxruntime as ort
    import samples
    from PIL import Image
    from tokenizers import Tokenizer
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed: pip install onnxruntime pillow tokenizers")

Floats = NDArray[np.float32]
Feed = dict[str, NDArray[Any]]
Generator = Callable[[Path], Iterator[Feed]]

MOST_FEEDS = 256  # both halves together; a model with more samples gets evenly spread ones
LINES = 256
PAGES = 32
CAPTCHAS = 200
SENTENCES = 128
LONGEST_SENTENCE = 128  # tokens
EEG_WINDOWS = 256
FILES_PER_TYPE = 40
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)
FRAME = 512  # samples that the voice-activity nets take at a time
CONTEXT = 64  # samples before a frame that they see again
MEL_WINDOW, MEL_STEP = 76, 8  # mel frames that the embedding net takes at a time, and how far apart
WAKE_WINDOW, WAKE_STEP = 16, 4  # embeddings that the wake-word net takes at a time, and how far apart
READING = 5 * samples.SAMPLE_RATE  # longest reading for the wake-word chain
BEGIN = END = 1024  # bytes of a file that magika looks at
BLOCK = 4096  # bytes within which white space is stripped before that
NO_BYTE = 256  # magika's padding


def batch_of_one(values: Floats) -> Floats:
    """Height x width x channels -> 1 x channels x height x width."""
    return np.ascontiguousarray(values.transpose(2, 0, 1)[None])


def open_model(zoo: Path, name: str) -> Any:
    """Open a float model of the zoo on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    path = zoo / "models" / f"{name}.onnx"
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def efficientnet(zoo: Path) -> Iterator[Feed]:
    """RGB, (pixel - 127) / 128: 20 photos, 134 cut-outs."""
    for image in samples.imagenet_squares(zoo / "data"):
        values = samples.pixels(image.resize((224, 224), Image.Resampling.BICUBIC))
        yield {"input": batch_of_one((values - np.float32(127)) / np.float32(128))}


def text_detection(zoo: Path) -> Iterator[Feed]:
    """Pages of 640 x 832, 0..1, minus the ImageNet mean, over its deviation."""
    for seed in range(PAGES):
        values = samples.pixels(samples.text_page(zoo / "data", seed, 640, 832)) / np.float32(255)
        yield {"x": batch_of_one(((values - IMAGENET_MEAN) / IMAGENET_DEVIATION).astype(np.float32))}


def line_input(image: Image.Image, width: int) -> Floats:
    """Blue first, -1..1, in the left of 1 x 3 x 48 x width; zeros fill the rest."""
    padded = np.zeros((1, 3, 48, width), np.float32)
    padded[:, :, :, : image.width] = batch_of_one(samples.pixels(image)[:, :, ::-1] / 127.5 - 1)
    return padded


def text_recognition(zoo: Path) -> Iterator[Feed]:
    """Lines 48 pixels high and at least 320 wide."""
    for seed in range(LINES):
        line = samples.text_line(zoo / "data", seed)
        width = int(line.width * 48 / line.height)
        yield {"x": line_input(line.resize((width, 48), Image.Resampling.BILINEAR), max(width, 320))}


def text_direction(zoo: Path) -> Iterator[Feed]:
    """Beginnings of lines, 48 x 192; every other line is upside down."""
    for seed in range(LINES):
        line = samples.text_line(zoo / "data", seed).rotate(180 * (seed % 2))
        line = line.crop((0, 0, min(line.width, 4 * line.height), line.height))
        width = min(192, int(line.width * 48 / line.height))
        yield {"x": line_input(line.resize((width, 48)), 192)}


def layout_detection(zoo: Path) -> Iterator[Feed]:
    """Pages, 0..1, in the left of a grey square of 1024 x 1024."""
    for seed in range(PAGES):
        page = samples.text_page(zoo / "data", seed, 832, 1088)
        canvas = Image.new("RGB", (1024, 1024), (114, 114, 114))
        canvas.paste(page.resize((832 * 1024 // 1088, 1024)), (0, 0))
        yield {"images": batch_of_one(samples.pixels(canvas) / np.float32(255))}


def face_detection(zoo: Path) -> Iterator[Feed]:
    """Crops, 64 x 64, in the middle of a grey 128 x 128, -1..1, channels last."""
    for crop in samples.face_crops(zoo / "data"):
        canvas = Image.new("RGB", (128, 128), (110, 110, 110))
        canvas.paste(crop.resize((64, 64), Image.Resampling.BICUBIC), (32, 32))
        yield {"input:0": (samples.pixels(canvas) / 127.5 - 1)[None]}


def face_classification(zoo: Path) -> Iterator[Feed]:
    """Crops, 48 x 48, (pixel - 127.5) / 128, channels last, x before y."""
    for crop in samples.face_crops(zoo / "data"):
        values = samples.pixels(crop.resize((48, 48), Image.Resampling.BILINEAR))
        yield {"input_3": ((values - 127.5) / 128).transpose(1, 0, 2)[None]}


def upscaling(zoo: Path, name: str, side: int, border: int) -> Iterator[Feed]:
    """Photographs shrunk by 2 to side x side, 0..1; `border` pixels are repeated around them."""
    for window in samples.photo_windows(zoo / "data", 2 * side):
        values = samples.pixels(window.resize((side, side), Image.Resampling.BICUBIC)) / 255
        yield {name: batch_of_one(np.pad(values, ((border, border), (border, border), (0, 0)), "edge"))}


def captcha_reading(zoo: Path) -> Iterator[Feed]:
    """Captchas, blue first, 0..255."""
    for image in samples.captchas(zoo / "data", CAPTCHAS):
        yield {"image": batch_of_one(samples.pixels(image)[:, :, ::-1])}


def file_types(zoo: Path) -> Iterator[Feed]:
    """First and last 1024 bytes of files, stripped of white space and padded with 256."""
    folders = [zoo / "data" / name for name in load_catalogue().models["magika_standard_v3_3"].data]
    for content in samples.typed_files(folders, FILES_PER_TYPE):
        begin = list(content[:BLOCK].lstrip()[:BEGIN])
        end = list(content[-BLOCK:].rstrip()[-END:])
        padded = begin + [NO_BYTE] * (BEGIN - len(begin)) + [NO_BYTE] * (END - len(end)) + end
        yield {"bytes": np.array([padded], np.int32)}


def sentence_encoding(zoo: Path) -> Iterator[Feed]:
    """Token ids of one text at a time, without padding."""
    with zipfile.ZipFile(zoo / "data" / "weights" / "all-minilm-l6-v2" / "model.zip") as packed:
        tokenizer = Tokenizer.from_str(packed.read("tokenizer.json").decode())
    tokenizer.enable_truncation(LONGEST_SENTENCE)
    tokenizer.no_padding()
    for text in samples.sentences(zoo / "data", SENTENCES):
        ids = np.array([tokenizer.encode(text).ids], np.int64)
        yield {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def speech_windows(signal: Floats) -> Floats:
    """Signal -> frames x 576: every frame with the 64 samples before it."""
    padded = np.concatenate([np.zeros(CONTEXT, np.float32), signal])
    starts = range(0, len(signal) - FRAME + 1, FRAME)
    return np.stack([padded[start : start + CONTEXT + FRAME] for start in starts])


def voice_activity_by_frame(zoo: Path) -> Iterator[Feed]:
    """Frame after frame, each with the state that the net left after the one before."""
    model = open_model(zoo, "silero_vad_v6")
    for signal in samples.speech_clips(zoo / "data"):
        state = np.zeros((2, 1, 128), np.float32)
        for window in speech_windows(signal):
            feed: Feed = {
                "input": window[None],
                "state": state,
                "sr": np.array(samples.SAMPLE_RATE, np.int64),
            }
            yield feed
            _, state = model.run(None, feed)


def voice_activity_in_sequence(zoo: Path) -> Iterator[Feed]:
    """All frames of a clip at once."""
    state = np.zeros((1, 1, 128), np.float32)
    for signal in samples.speech_clips(zoo / "data"):
        yield {"input": speech_windows(signal), "h": state, "c": state}


def wake_word_audio(zoo: Path) -> Iterator[Feed]:
    """Read speech with the values of 16-bit integers."""
    for path in samples.readings(zoo / "data"):
        yield {"input": (samples.load_wave(path)[:READING] * 32767)[None]}


def wake_word_mel(zoo: Path) -> Iterator[Feed]:
    """Windows of the front end's mel spectrum, scaled as openWakeWord does: windows x 76 x 32 x 1."""
    front_end = open_model(zoo, "oww_melspectrogram")
    for feed in wake_word_audio(zoo):
        mel = front_end.run(None, feed)[0].squeeze() / 10 + 2
        starts = range(0, len(mel) - MEL_WINDOW, MEL_STEP)
        yield {"input_1": np.stack([mel[start : start + MEL_WINDOW] for start in starts])[..., None]}


def wake_word_embeddings(zoo: Path) -> Iterator[Feed]:
    """Windows of 16 embeddings of 96 values."""
    embedding = open_model(zoo, "oww_embedding_model")
    for feed in wake_word_mel(zoo):
        values = embedding.run(None, feed)[0].reshape(-1, 96)
        for start in range(0, len(values) - WAKE_WINDOW, WAKE_STEP):
            yield {"x.1": values[None, start : start + WAKE_WINDOW]}


def random_eeg(_: Path) -> Iterator[Feed]:
    """Draw normal noise, for want of real EEG: good for comparing two files, not for calibrating one."""
    for seed in range(EEG_WINDOWS):
        yield {"x": np.random.RandomState(seed).randn(1, 100, 60).astype(np.float32)}


GENERATORS: dict[str, Generator] = {
    "efficientnet_lite0_bn": efficientnet,
    "ppocrv4_det": text_detection,
    "ppocrv4_rec": text_recognition,
    "ppocr_cls_mobile_v2": text_direction,
    "yolov8n_doclaynet": layout_detection,
    "blazeface_front": face_detection,
    "mtcnn_onet": face_classification,
    "waifu2x_upconv7_x2": lambda zoo: upscaling(zoo, "input", side=96, border=7),
    "espcn_nn_resize_x2": lambda zoo: upscaling(zoo, "onnx::Relu_0", side=128, border=0),
    "captcha_crnn": captcha_reading,
    "magika_standard_v3_3": file_types,
    "all_minilm_l6_v2": sentence_encoding,
    "silero_vad_v6": voice_activity_by_frame,
    "silero_vad_fw_seq": voice_activity_in_sequence,
    "oww_melspectrogram": wake_word_audio,
    "oww_embedding_model": wake_word_mel,
    "oww_hey_jarvis": wake_word_embeddings,
    "eeg_seizure_lstm": random_eeg,
}
RUNS = {  # the float models that a generator runs
    "silero_vad_v6": ("silero_vad_v6",),
    "oww_embedding_model": ("oww_melspectrogram",),
    "oww_hey_jarvis": ("oww_melspectrogram", "oww_embedding_model"),
}


def missing(name: str, zoo: Path) -> list[str]:
    """List the models that `fetch.py` should bring, with their data, before these feeds can be made."""
    models = [model for model in RUNS.get(name, ()) if not (zoo / "models" / f"{model}.onnx").is_file()]
    data = load_catalogue().models[name].data
    return models if all((zoo / "data" / folder).is_dir() for folder in data) else [name, *models]


def write_feeds(feeds: list[Feed], folder: Path) -> dict[str, int]:
    """Replace `folder` by the two halves; return how many feeds each has got."""
    numbers = np.linspace(0, len(feeds) - 1, min(len(feeds), MOST_FEEDS)).astype(int)
    order = np.random.RandomState(0).permutation(numbers)
    halves = {"calibration": order[::2], "evaluation": order[1::2]}
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for half, chosen in halves.items():
        (partial / half).mkdir(parents=True)
        for number in chosen:
            np.savez_compressed(partial / half / f"{number:05d}.npz", allow_pickle=False, **feeds[number])
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return {half: len(chosen) for half, chosen in halves.items()}


def main() -> int:
    """Write the feeds of the models asked for, one line a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all models of the zoo")
    parser.add_argument("--zoo", type=Path, default=fetch.ZOO, help="what fetch.py wrote (default: models/zoo)")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in GENERATORS]:
        parser.error(f"no model {', '.join(unknown)}; there are: {', '.join(GENERATORS)}")
    complete = True
    for name in arguments.names or GENERATORS:
        if absent := missing(name, arguments.zoo):
            wanted = " ".join(dict.fromkeys(absent))
            print(f"{name:22} MISSING models or data: run python models/fetch.py {wanted}", flush=True)
            complete = False
            continue
        feeds = list(GENERATORS[name](arguments.zoo))
        counts = write_feeds(feeds, arguments.zoo / "feeds" / name)
        shapes = ", ".join(f"{key} {value.dtype} {list(value.shape)}" for key, value in feeds[0].items())
        print(f"{name:22} {counts['calibration']:3} + {counts['evaluation']:3} feeds of {shapes}", flush=True)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
