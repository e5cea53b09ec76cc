"""An adapter from anywhere can be read: it runs no code, asks for no memory, and what is wrong is said by file."""

import copy
import json
import struct
import tracemalloc
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import LAYERS, WIDTH, make_model, make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from priors_peft import PriorConfig, PriorPeftModel, get_prior_model
from priors_peft.files import sha256
from priors_peft.hub import reading
from priors_peft.hub.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PRIOR_CONFIG, PRIOR_WEIGHTS, read_adapter
from priors_peft.hub.export import export_adapter
from priors_peft.inference.posterior import MixturePosterior
from priors_peft.inference.variational import Variational


COUNT = 4
FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, PRIOR_CONFIG, PRIOR_WEIGHTS)


@cache
def base():
    return make_model()


@cache
def contents(tuning: str = "soft") -> dict[str, bytes]:
    """The four files of a sound adapter."""
    import tempfile

    config = PriorConfig(num_virtual_tokens=COUNT, tuning=tuning, base_model_name_or_path="user/base")
    with tempfile.TemporaryDirectory() as folder:
        get_prior_model(base(), config).save_pretrained(folder)
        return {name: (Path(folder) / name).read_bytes() for name in FILES}


def write(folder: Path, files: dict[str, bytes], rehash: bool = False) -> Path:
    """An adapter folder; with hashes that agree, as whoever means harm would write them."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    if rehash:
        described = json.loads(files[PRIOR_CONFIG])
        described["sha256"] = {name: sha256(folder / name) for name in (ADAPTER_WEIGHTS, PRIOR_WEIGHTS)}
        (folder / PRIOR_CONFIG).write_text(json.dumps(described))
    return folder


def changed(folder: Path, file: str, **values) -> Path:
    """An adapter folder with fields of one configuration changed."""
    files = dict(contents())
    described = json.loads(files[file])
    (described["config"] if file == PRIOR_CONFIG else described).update(values)
    return write(folder, files | {file: json.dumps(described).encode()})


def as_if_from_hub(monkeypatch, folder: Path) -> None:
    def fetched(model_id, filename, hub_arguments):
        return folder / filename if (folder / filename).is_file() else None

    monkeypatch.setattr("priors_peft.hub.adapter.fetch_file", fetched)
    monkeypatch.setattr(reading, "fetch_file", fetched)


@pytest.mark.parametrize("file", [ADAPTER_CONFIG, PRIOR_CONFIG])
@pytest.mark.parametrize(
    "values, message",
    [
        ({"trust_remote_code": True}, "trust_remote_code must not be asked for"),
        ({"base_model_name_or_path": "../../secret"}, "base_model_name_or_path must not lead out of its folder"),
        ({"base_model_name_or_path": "models\\..\\secret"}, "base_model_name_or_path must not lead out of its folder"),
        ({"tokenizer_name_or_path": "a/../b"}, "tokenizer_name_or_path must not lead out of its folder"),
        ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path must be a name"),
        ({"revision": {"a": 1}}, "revision must be a name"),
        ({"num_virtual_tokens": 10**12}, "num_virtual_tokens must be an integer in"),
        ({"num_virtual_tokens": 2**20, "token_dim": 2**16}, "must make at most"),
        ({"token_dim": 10**9}, "token_dim must be an integer in"),
        ({"num_layers": 10**12}, "num_layers must be an integer in"),
        ({"num_attention_heads": -1}, "num_attention_heads must be an integer in"),
        ({"encoder_hidden_size": 1e300}, "encoder_hidden_size must be an integer in"),
        ({"num_virtual_tokens": True}, "num_virtual_tokens must be an integer in"),
    ],
)
def test_what_a_configuration_must_not_ask_for(file, values, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        PriorPeftModel.from_pretrained(base(), changed(tmp_path, file, **values))
    assert file in str(error.value)


@pytest.mark.parametrize("file", [ADAPTER_CONFIG, PRIOR_CONFIG])
@pytest.mark.parametrize("name", ["/etc/model", "~/model", "C:\\model", "\\\\host\\model"])
def test_a_path_of_its_authors_machine_is_refused_from_the_hub_only(file, name, tmp_path, monkeypatch):
    folder = changed(tmp_path, file, base_model_name_or_path=name)
    read_adapter(folder)  # trained here, on a model in a folder
    as_if_from_hub(monkeypatch, folder)
    with pytest.raises(ValueError, match="base_model_name_or_path must be a Hub id") as error:
        read_adapter("user/adapter")
    assert file in str(error.value)


def test_a_base_model_beside_the_working_directory_is_saved_by_its_whole_path(tmp_path, monkeypatch):
    make_model().save_pretrained(tmp_path / "base")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    from transformers import AutoModelForCausalLM

    model = get_prior_model(AutoModelForCausalLM.from_pretrained("../base"), PriorConfig(num_virtual_tokens=2))
    model.save_pretrained("adapter")
    assert read_adapter("adapter").config.base_model_name_or_path == str(tmp_path / "base")


def test_declared_sizes_take_no_memory(tmp_path):
    files = dict(contents())
    described = json.loads(files[PRIOR_CONFIG])
    described["config"] |= {"num_virtual_tokens": 2**20, "token_dim": 2**12, "num_layers": 2**12, "layers": "all"}
    folder = write(tmp_path, files | {PRIOR_CONFIG: json.dumps(described).encode()})
    tracemalloc.start()
    with pytest.raises(ValueError, match="must belong together"):
        read_adapter(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_weights_that_would_need_unpickling_are_not_looked_at(tmp_path):
    files = dict(contents())
    pickled = b"\x80\x04cos\nsystem\n(S'false'\ntR."
    del files[ADAPTER_WEIGHTS]
    folder = write(tmp_path, files | {"adapter_model.bin": pickled})
    with pytest.raises(FileNotFoundError, match=f"has no {ADAPTER_WEIGHTS}"):
        read_adapter(folder)
    folder = write(tmp_path, contents() | {ADAPTER_WEIGHTS: pickled, PRIOR_WEIGHTS: pickled}, rehash=True)
    with pytest.raises(ValueError, match=f"{PRIOR_WEIGHTS} must be a whole safetensors file"):
        read_adapter(folder)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": ' * 100_000, '{"a": ' + "9" * 5000 + "}", "\ufeff{}", "nul", "\0"]
)
def test_malicious_json_is_refused_by_name(text, tmp_path):
    for file in (ADAPTER_CONFIG, PRIOR_CONFIG):
        folder = write(tmp_path, contents() | {file: text.encode()})
        with pytest.raises(ValueError, match="must be JSON") as error:
            read_adapter(folder)
        assert file in str(error.value)


def test_a_configuration_of_gigabytes_is_not_read(tmp_path):
    folder = write(tmp_path, contents())
    with open(folder / ADAPTER_CONFIG, "wb") as file:
        file.truncate(2**33)  # a hole, which takes no room on the disk
    with pytest.raises(ValueError, match=f"{ADAPTER_CONFIG} must be at most"):
        read_adapter(folder)


@pytest.mark.parametrize("name", ["prompt", "coordinate", "point"])
def test_a_prompt_that_is_not_finite_is_refused(tmp_path, name):
    folder = write(tmp_path, contents())
    tensors = load_file(folder / PRIOR_WEIGHTS)
    tensors.setdefault("point", tensors["coordinate"].clone())[0, 0, 0] = 0.5
    tensors[name][0, 0, 0] = float("nan")
    save_file(tensors, folder / PRIOR_WEIGHTS)
    write(tmp_path / "b", {name: (folder / name).read_bytes() for name in FILES}, rehash=True)
    with pytest.raises(ValueError, match="the prompt and its prior must be finite"):
        read_adapter(tmp_path / "b")


@pytest.mark.parametrize("name", ["means", "gaussians.0.rho", "gaussians.2.rho", "gaussians.2.factor"])
def test_every_gaussian_of_a_mixture_must_be_finite(tmp_path, name):
    settings = {"inference": "variational", "inference_kwargs": {"components": 3, "rank": 1}}
    model = get_prior_model(make_model(), PriorConfig(num_virtual_tokens=4, **settings), tokenizer=make_tokenizer())
    encoder = model.prompt_encoder["default"]
    parts = [Variational(rank=1).start(encoder) for _ in range(3)]
    encoder.posterior = MixturePosterior(parts, torch.zeros(2, *encoder.coordinate.shape), trained=True)
    model.save_pretrained(tmp_path / "a")
    read_adapter(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / PRIOR_WEIGHTS)
    tensors[f"posterior.{name}"].view(-1)[-1] = float("nan")
    save_file(tensors, tmp_path / "a" / PRIOR_WEIGHTS)
    write(tmp_path / "b", {file: (tmp_path / "a" / file).read_bytes() for file in FILES}, rehash=True)
    with pytest.raises(ValueError, match="the posterior must give finite prompts"):
        read_adapter(tmp_path / "b")


def test_an_index_that_names_files_elsewhere_is_refused(tmp_path):
    make_model().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    make_tokenizer().save_pretrained(tmp_path / "base")
    index = tmp_path / "base" / "model.safetensors.index.json"
    described = json.loads(index.read_text())
    described["weight_map"]["model.norm.weight"] = "../outside.safetensors"
    index.write_text(json.dumps(described))
    (tmp_path / "outside.safetensors").write_bytes(b"mine")
    adapter = write(tmp_path / "adapter", contents())
    with pytest.raises(ValueError, match="must name files of its own folder, got '../outside.safetensors'"):
        export_adapter(adapter, "checkpoint", tmp_path / "out" / "deeper", base_model=str(tmp_path / "base"))
    assert (tmp_path / "outside.safetensors").read_bytes() == b"mine"


# Fuzzing: whatever is in the files, there is a model or a clean error that names one of them.

fuzz = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-2, 40),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["soft", "deep", "all", "gaussian", "structured", "empirical", "text", "plain", "whitened", "auto"]
    ),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=4)),
    max_leaves=8,
)


def check(folder: Path) -> None:
    """A model that runs, or an error that a user can read."""
    try:
        model = PriorPeftModel.from_pretrained(base(), folder)
    except (ValueError, OSError) as error:
        named = any(name in str(error) for name in FILES)
        assert named or "adapter" in str(error), f"{error!r} names no file"
        return
    with torch.no_grad():
        assert model(torch.tensor([[3, 4]])).logits.shape == (1, 2, 96)


def paths(described: object, path: tuple = ()) -> list[tuple]:
    """Every place in a JSON value."""
    found = [path] if path else []
    if isinstance(described, dict):
        for key, value in described.items():
            found += paths(value, (*path, key))
    return found


def edited(described: dict, path: tuple, value: object, delete: bool) -> dict:
    described = copy.deepcopy(described)
    inner = described
    for key in path[:-1]:
        inner = inner[key]
    if delete:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return described


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "adapter"


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["soft", "deep"])
@pytest.mark.parametrize("file", [ADAPTER_CONFIG, PRIOR_CONFIG])
def test_fuzzed_fields_end_in_a_model_or_a_clean_error(file, tuning, folder):
    described = json.loads(contents(tuning)[file])
    places = paths(described)

    @fuzz
    @given(st.lists(st.tuples(st.sampled_from(places), values, st.booleans()), min_size=1, max_size=3))
    def run(edits):
        now = described
        for path, value, delete in edits:
            try:
                now = edited(now, path, value, delete)
            except (KeyError, TypeError):
                continue  # an earlier edit took the place away
        check(write(folder, contents(tuning) | {file: json.dumps(now).encode()}))

    run()


@pytest.mark.parametrize("file", [ADAPTER_CONFIG, PRIOR_CONFIG])
@fuzz
@given(st.one_of(st.binary(max_size=200), values.map(lambda value: json.dumps(value).encode())))
def test_fuzzed_json_ends_in_a_clean_error(folder, file, data):
    check(write(folder, contents() | {file: data}))


def test_a_stock_adapters_fuzzed_configuration_ends_in_a_model_or_a_clean_error(folder):
    described = json.loads(contents()[ADAPTER_CONFIG])
    files = {ADAPTER_WEIGHTS: contents()[ADAPTER_WEIGHTS]}

    @fuzz
    @given(st.sampled_from(sorted(described)), values)
    def run(name, value):
        check(write(folder, files | {ADAPTER_CONFIG: json.dumps(described | {name: value}).encode()}))

    run()


def with_header(data: bytes, header: bytes, length: int | None = None) -> bytes:
    old = struct.unpack("<Q", data[:8])[0]
    return struct.pack("<Q", len(header) if length is None else length) + header + data[8 + old :]


dtypes = st.sampled_from(["F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "X", ""])


@pytest.mark.parametrize("rehash", [True, False])
@pytest.mark.parametrize("file", [ADAPTER_WEIGHTS, PRIOR_WEIGHTS])
def test_fuzzed_headers_end_in_a_model_or_a_clean_error(file, rehash, folder):
    data = contents()[file]
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    names = [name for name in header if name != "__metadata__"]
    fields = st.sampled_from(["dtype", "shape", "data_offsets", "name"])
    sizes = st.lists(st.one_of(st.integers(0, 40), st.integers(0, 2**64)), max_size=4)

    @fuzz
    @given(st.data())
    def run(draw):
        fuzzed = copy.deepcopy(header)
        name, field = draw.draw(st.sampled_from(names)), draw.draw(fields)
        if field == "name":
            fuzzed[draw.draw(st.text(max_size=12))] = fuzzed.pop(name)
        else:
            fuzzed[name][field] = draw.draw(dtypes if field == "dtype" else st.one_of(sizes, values))
        length = draw.draw(st.one_of(st.none(), st.integers(0, 2**64 - 1)))
        files = contents() | {file: with_header(data, json.dumps(fuzzed).encode(), length)}
        if file == ADAPTER_WEIGHTS and draw.draw(st.booleans()):
            files = {name: files[name] for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}  # as a stock adapter
            check(write(folder, files))
        else:
            check(write(folder, files, rehash))

    run()


tensors = st.builds(
    lambda shape, kind: torch.ones(shape).to(kind),
    st.lists(st.sampled_from([0, 1, 2, COUNT, WIDTH, LAYERS]), max_size=3),
    st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16, torch.complex64]),
)


@pytest.mark.parametrize("tuning", ["soft", "deep"])
def test_tensors_that_dont_belong_together_end_in_a_clean_error(tuning, folder, tmp_path):
    (tmp_path / PRIOR_WEIGHTS).write_bytes(contents(tuning)[PRIOR_WEIGHTS])
    sound = load_file(tmp_path / PRIOR_WEIGHTS)

    @fuzz
    @given(st.sampled_from(sorted(sound)), st.one_of(st.none(), tensors))
    def run(name, tensor):
        fuzzed = {key: value for key, value in sound.items() if key != name or tensor is not None}
        save_file(fuzzed | ({} if tensor is None else {name: tensor}), tmp_path / "fuzzed.safetensors")
        files = contents(tuning) | {PRIOR_WEIGHTS: (tmp_path / "fuzzed.safetensors").read_bytes()}
        check(write(folder, files, rehash=True))

    run()
