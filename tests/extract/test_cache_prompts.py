"""Prompt sets are listed and added with the encoder of the cache; clips are unchanged."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from vaflow.cache import Cache, create_cache, open_cache
from vaflow.cache.maintenance import verify
from vaflow.cache.schema import StreamInfo
from vaflow.cli import main
from vaflow.encoders.base import VisualEncoder
from vaflow.encoders.prompts import load_prompts, prototypes
from vaflow.errors import FingerprintError, UsageError
from vaflow.extract.streams import add_prompts, list_prompts, write_prompts
from vaflow.train.config import merge
from vaflow.train.inputs import resolve

LEVELS = ("low", "middle", "high")
SAMPLING = {"window": 4.0, "stride": 2.0, "frames": 4, "audio_steps": 4}


@pytest.fixture
def clip(tiny_pair: tuple) -> VisualEncoder:
    encoder: VisualEncoder = tiny_pair[0]
    return encoder


def prompt_file(path: Path, word: str = "plain") -> Path:
    words = "\n".join(f'v_{v}.a_{a} = "{word} {v} {a}"' for v in LEVELS for a in LEVELS)
    path.write_text(f'[templates]\none = "a {{}} face"\ntwo = "looks {{}}"\n[descriptions]\n{words}\n')
    return path


def visual(encoder: VisualEncoder, **changed: object) -> StreamInfo:
    identity = encoder.identity | {"sampling": SAMPLING, "picture": {"faces": "toy"}} | changed
    return StreamInfo(encoder.name, "visual", encoder.dim, "float16", identity)


@pytest.fixture
def cache(tmp_path: Path, clip: VisualEncoder) -> Cache:
    """A cache after extraction: one clip, the built-in prompt set."""
    cache = create_cache(tmp_path / "cache")
    cache.declare(visual(clip))
    time = np.arange(4.0)
    made = {"embedding": np.ones((4, clip.dim), np.float16), "time": time, "valid": np.ones(4, bool)}
    cache.write(clip.name, "a", made, source={"video": {"size": 1}})
    write_prompts(cache, load_prompts(), [clip])
    return cache


def test_adding_a_prompt_set_changes_nothing_else(cache, clip, tmp_path):
    before = {path: path.read_bytes() for path in cache.record_files()}
    done = add_prompts(cache, prompt_file(tmp_path / "plain.toml"))
    assert (done.name, done.new, done.replaced, done.unchanged) == ("plain", ["clip-tiny.text"], [], [])
    assert before == {path: path.read_bytes() for path in cache.record_files() if path in before}
    embedding, template = prototypes(clip, load_prompts(tmp_path / "plain.toml"))
    stored = cache.read("clip-tiny.text", "plain")
    np.testing.assert_array_equal(stored.embedding, embedding)
    np.testing.assert_array_equal(stored.template, template)
    assert [one.name for one in list_prompts(cache)] == ["default", "plain"]
    assert list_prompts(cache)[1].descriptions[5] == "plain middle high"
    assert list_prompts(cache)[0].templates == load_prompts().templates
    assert verify(cache) == []


def test_training_uses_the_named_prompt_set(cache, clip, tmp_path):
    add_prompts(cache, prompt_file(tmp_path / "plain.toml"))
    _, inputs = resolve(cache, merge({"prompts": "plain", "audio": "none"}))
    assert inputs.prototypes is not None
    np.testing.assert_array_equal(inputs.prototypes.numpy(), prototypes(clip, load_prompts(tmp_path / "plain.toml"))[0])


def test_prompt_sets_are_compared_by_words(cache, tmp_path):
    file = prompt_file(tmp_path / "plain.toml")
    add_prompts(cache, file)
    attempt = cache.record("clip-tiny.text", "plain").attempt
    assert add_prompts(cache, file).unchanged == ["clip-tiny.text"]
    assert cache.record("clip-tiny.text", "plain").attempt == attempt
    assert add_prompts(cache, prompt_file(file, "other")).replaced == ["clip-tiny.text"]
    assert cache.record("clip-tiny.text", "plain").source["prompts"]["descriptions"][0] == "other low low"


def test_prototypes_can_be_added_to_a_cache(tmp_path, clip):
    cache = create_cache(tmp_path / "cache")
    cache.declare(visual(clip))
    assert list_prompts(cache) == []
    add_prompts(cache, prompt_file(tmp_path / "plain.toml"))
    assert cache.streams()["clip-tiny.text"].identity == clip.identity


@pytest.mark.parametrize("with_text", [False, True])
def test_a_different_encoder_of_the_same_name_is_rejected(tmp_path, clip, with_text):
    """The cache's images were encoded with other weights, so text and image embeddings would not be comparable."""
    cache = create_cache(tmp_path / "cache")
    if with_text:
        cache.declare(visual(clip))
        cache.declare(StreamInfo("clip-tiny.text", "text", clip.dim, "float32", clip.identity | {"weights": "ffff"}))
    else:
        cache.declare(visual(clip, weights="ffff"))
    with pytest.raises(FingerprintError, match=r"weights: cache has 'ffff', now .*--weights clip-tiny=PATH"):
        add_prompts(cache, prompt_file(tmp_path / "plain.toml"))
    assert [path.parent.name for path in cache.record_files()] == []
    assert with_text == ("clip-tiny.text" in cache.streams())


def test_prompts_without_a_text_tower_are_usage_errors(cache, tmp_path, clip):
    file = prompt_file(tmp_path / "plain.toml")
    with pytest.raises(UsageError, match=r"no visual stream of this name.*Got: clip-vit-b16\. Choices: clip-tiny"):
        add_prompts(cache, file, "clip-vit-b16")
    with pytest.raises(UsageError, match=r"not used\. Got: ast\. Choices: clip-tiny"):
        add_prompts(cache, file, weights={"ast": file})
    cache.declare(StreamInfo("mine", "visual", 8, "float16", {"encoder": "imported"}))
    with pytest.raises(UsageError, match="No visual encoder makes stream 'mine'"):
        add_prompts(cache, file, "mine")
    imported = create_cache(tmp_path / "imported")
    imported.declare(StreamInfo("mine", "visual", 8, "float16", {"encoder": "imported"}))
    with pytest.raises(UsageError, match="has a text tower"):
        add_prompts(imported, file)
    with pytest.raises(UsageError, match="opened for reading"):
        add_prompts(open_cache(cache.path), file)


def test_the_prompts_command_lists_and_adds(cache, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["cache", "prompts", "cache"]) == 0
    assert re.search(r"clip-tiny\.text +default +3", capsys.readouterr().out)
    assert main(["cache", "prompts", "--help"]) == 0
    example = re.search(r"Example: vaflow ([^\n]+)", capsys.readouterr().out)
    assert example is not None
    prompt_file(tmp_path / "plain.toml")
    assert main(example[1].split()) == 0
    assert "--set prompts=plain" in capsys.readouterr().out
    assert main(["cache", "prompts", "cache", "--json"]) == 0
    sets = json.loads(capsys.readouterr().out)["sets"]
    assert [(one["stream"], one["name"]) for one in sets] == [
        ("clip-tiny.text", "default"),
        ("clip-tiny.text", "plain"),
    ]
    assert main(["cache", "prompts", "cache", "-v"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^# stream +set +templates +created\n# -+", printed)
    for name, text in zip(("default", "plain"), printed.split("# clip-tiny.text, ")[1:], strict=True):
        (tmp_path / f"{name}.toml").write_text(f"# {text}")
        one = next(one for one in sets if one["name"] == name)
        copied = load_prompts(tmp_path / f"{name}.toml")
        assert [list(copied.templates), list(copied.descriptions)] == [one["templates"], one["descriptions"]]
    assert main(["cache", "prompts", "cache", "--visual", "clip-tiny"]) == 2
    assert main(["cache", "prompts", "cache", "--prompts", "missing.toml"]) == 2
