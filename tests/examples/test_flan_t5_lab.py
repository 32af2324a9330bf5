"""The FLAN-T5 lab from end to end on a tiny T5, a tiny tokenizer and a dozen dialogues, and each of its parts.

The tiny T5 was taught to repeat what is said last. So, like FLAN-T5 in the lab, it answers a dialogue with one of its
lines before it is trained to summarize."""
import collections
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

import minipeft

EXAMPLES = Path(__file__).parents[2] / "examples"
DIALOGUES = EXAMPLES / "data" / "dialogues.csv"
BEFORE, AFTER = "Summarize the following conversation.\n\n", "\n\nSummary:"
SHORT = ["--batch", "4", "--max-new", "16", "--test", "4"]
FAST = [*SHORT, "--steps", "60", "--lr", "1e-2", "--full-lr", "3e-3"]


def tokenizer_of(texts):
    """A tokenizer like T5's, Unigram over words with pad 0, eos 1 and unk 2; it knows the words of `texts` alone."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    words = collections.Counter(f"▁{word}" for text in texts for word in text.split())
    vocabulary = [*((token, 0.0) for token in ("<pad>", "</s>", "<unk>")),
                  *((word, math.log(count / words.total())) for word, count in sorted(words.items()))]
    made = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=False))
    made.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace("▁"), decoders.Metaspace("▁")
    made.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the tiny T5 and its tokenizer. The table has more rows than the tokenizer has tokens, as FLAN's."""
    rows = [json.loads(line) for line in DIALOGUES.with_suffix(".jsonl").read_text("utf-8").splitlines()]
    tokenizer = tokenizer_of([BEFORE + AFTER, *(text for row in rows for text in (row["dialogue"], row["summary"]))])
    config = minipeft.T5Config(vocab_size=tokenizer.get_vocab_size() + 5, d_model=64, d_kv=16, num_heads=4, d_ff=128,
                               num_layers=2, num_decoder_layers=2, feed_forward_proj="gated-gelu", dropout_rate=0.0)

    def ids(text):
        return [*tokenizer.encode(text, add_special_tokens=False).ids, 1]

    pairs = [(ids(BEFORE + row["dialogue"] + AFTER), ids(row["dialogue"].splitlines()[-1])) for row in rows]
    model = minipeft.T5(config, numpy.random.default_rng(0))
    minipeft.fit(model, minipeft.select(model, ".*"), minipeft.Batches(pairs, 6), steps=60,
                 optimizer=minipeft.AdamW(5e-3), schedule=minipeft.linear_decay(60))
    made = tmp_path_factory.mktemp("lab") / "tiny-t5"
    model.save_pretrained(made)
    tokenizer.save(str(made / "tokenizer.json"))
    return made


@pytest.fixture
def program(example, monkeypatch):
    monkeypatch.setattr(minipeft, "keep_heap", lambda: True)            # it would be for all tests of this process
    return example("flan_t5_lab")


@pytest.fixture
def lab_of(program, example, folder, tmp_path):
    """A function from more arguments to the Lab, read and not begun."""
    def made(*more, data=DIALOGUES, model=folder):
        args = program.arguments(["--model", str(model), "--data", str(data), "--out", str(tmp_path), *more])
        return example("lab.flan_run").Lab(args)
    return made


def failed(printed):
    return [line.split("FAILS ")[1] for line in printed.splitlines() if "FAILS" in line]


# ---- from end to end


def test_the_lab_trains_both_ways_compares_three_models_and_reads_its_own_files_again(folder, tmp_path):
    done = subprocess.run([sys.executable, str(EXAMPLES / "flan_t5_lab.py"), "--model", str(folder), "--data",
                           str(DIALOGUES), "--out", str(tmp_path / "out"), *FAST], capture_output=True, text=True,
                          timeout=120, encoding="utf-8",
                          env={**os.environ, "PYTHONIOENCODING": "utf-8", "COLUMNS": "200"})
    assert done.returncode == 0 and not failed(done.stdout), done.stdout + done.stderr
    out, model = tmp_path / "out", minipeft.T5.from_pretrained(folder)
    found = json.loads((out / "results.json").read_text("utf-8"))
    assert {path.name for path in out.iterdir()} == {"results.json", "flan_t5_lab.png", "lora.safetensors", "peft_lora"}
    original, instruct, peft = found["rows"]
    assert [row["method"] for row in found["rows"]] == ["original", "instruct", "peft"]
    assert len(found["claims"]) == 10 and all(found["claims"].values())
    # the lab's lines: all, then r (64 + 64) on q and v of six attentions, then nothing
    everything = minipeft.report(model).all
    assert re.findall(r"^trainable model parameters: (\d+)$", done.stdout, re.MULTILINE) == [
        str(everything), str(everything), str(12 * 32 * 128), "0"]
    # learned, and compared in points and in percent
    for row in (instruct, peft):
        assert row["losses"][-1] < 0.2 * row["losses"][0] and len(row["losses"]) == 60
        points = {kind: found["differences"][f"{row['method']} - original"][kind]["points"] for kind in row["rouge"]}
        assert points["rouge1"] == pytest.approx(numpy.mean(row["rouge"]["rouge1"])
                                                 - numpy.mean(original["rouge"]["rouge1"])) and points["rouge1"] > 5
    assert f"{points['rouge1']:+.2f}" in done.stdout and "absolute points" in done.stdout
    # what was printed is what was said: one prompt, the human's summary, three answers
    first = found["test"][0]
    for text in (first["dialogue"], first["summary"], original["answers"][0]):
        assert text in done.stdout
    assert original["answers"][0] == first["dialogue"].splitlines()[-1]
    # the directory is one of PEFT's: it holds the same LoRA
    config = json.loads((out / "peft_lora" / "adapter_config.json").read_text("utf-8"))
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["lora_dropout"], config["target_modules"]) \
        == ("LORA", 32, 32, 0.05, ["q", "v"])
    ours, theirs = minipeft.load(model, out / "lora.safetensors"), minipeft.load(model, out / "peft_lora")
    assert list(ours.tensors) == list(theirs.tensors)
    assert all(numpy.array_equal(array, theirs.tensors[key]) for key, array in ours.tensors.items())


def test_half_precision_is_widened_full_fine_tuning_can_be_left_out_and_the_checks_fail_when_nothing_was_learned(
        program, folder, tmp_path, capsys):
    half = tmp_path / "half"
    minipeft.T5.from_pretrained(folder).save_pretrained(half, dtype="bfloat16")
    shutil.copy(folder / "tokenizer.json", half)
    said = ["--model", str(half), "--data", str(DIALOGUES.with_suffix(".jsonl")), "--out", str(tmp_path), *SHORT,
            "--full-steps", "0", "--steps", "1", "--lr", "1e-12", "--beams", "2"]
    for _ in range(2):                                  # the second run finds the files of the first
        assert program.main(said) == 1
    printed = capsys.readouterr().out
    assert "full fine-tuning is left out" in printed
    assert [line.split(" than ")[0] for line in failed(printed)] == 2 * [
        "peft has a lower loss on held-out dialogues", "peft has a higher rouge1"]
    rows = json.loads((tmp_path / "results.json").read_text("utf-8"))["rows"]
    assert [row["method"] for row in rows] == ["original", "peft"]
    assert rows[0]["answers"] == rows[1]["answers"]


def test_the_same_seed_gives_the_same_rows_and_another_seed_others(lab_of):
    def rows(seed):
        lab = lab_of(*SHORT, "--steps", "2", "--seed", seed)
        return [(row.losses, row.loss, row.ids) for row in (lab.original(), lab.instruct()[0], lab.peft()[0])]

    first = rows("3")
    assert rows("3") == first and rows("4") != first


# ---- the five pitfalls


def test_the_check_of_padding_fails_if_padding_is_learned_or_read(lab_of, example, monkeypatch):
    lab, padding = lab_of(*SHORT), example("lab.flan_lab").padding
    assert padding(lab)[1]
    with monkeypatch.context() as learned:
        def labels_of_pads(pairs, pad, batch_of=minipeft.batch_of):
            batch = batch_of(pairs, pad)
            return {**batch, "labels": numpy.where(batch["labels"] == -100, pad, batch["labels"])}
        learned.setattr(minipeft, "batch_of", labels_of_pads)
        assert not padding(lab)[1]
    with monkeypatch.context() as read:
        def without_mask(pairs, pad, batch_of=minipeft.batch_of):
            batch = batch_of(pairs, pad)
            return {**batch, "attention_mask": numpy.ones_like(batch["input_ids"])}
        read.setattr(minipeft, "batch_of", without_mask)
        assert not padding(lab)[1]


def test_an_answer_is_asked_for_with_the_mask_of_the_padding(lab_of, monkeypatch):
    lab, asked, generate = lab_of(*SHORT, "--max-new", "1"), [], minipeft.T5.generate
    monkeypatch.setattr(minipeft.T5, "generate", lambda self, *ids_and_mask, **more: asked.append(
        ids_and_mask) or generate(self, *ids_and_mask, **more))
    assert len(lab.ids(lab.base)) == 4
    (ids, mask), = asked
    lengths = [len(source) for source, _ in lab.test_pairs]
    assert mask.sum(axis=1).tolist() == lengths and len(set(lengths)) > 1
    assert all((row[length:] == 0).all() and row[length - 1] == 1 for row, length in zip(ids, lengths))


def test_what_is_trained_on_is_what_is_asked_and_a_long_dialogue_keeps_the_last_words_of_the_template(lab_of):
    lab = lab_of(*SHORT)
    asked = lab.prompts.prompt(lab.train[0].dialogue)
    assert asked == BEFORE + lab.train[0].dialogue + AFTER
    assert lab.train_pairs[0][0] == [*lab.prompts.tokenizer.encode(asked).ids, 1]
    said = lab.train_pairs[0][1]
    assert lab.prompts.text(said) == lab.train[0].summary == lab.prompts.text([0, *said, 5, 6, 0])  # up to </s>
    assert lab.prompts.text([*said[:-1], lab.base.config.vocab_size - 1]) == lab.train[0].summary   # an id of no token
    few = lab_of(*SHORT, "--max-source", "12", "--max-target", "5")
    source, target = few.train_pairs[0]
    words = asked.split()
    assert (len(source), len(target)) == (12, 5) and target == [*lab.train_pairs[0][1][:4], 1]
    assert few.prompts.text(source).split() == [*words[:10], "Summary:"]
    assert re.fullmatch(r"prompts of 29 to 3\d tokens \(8 cut to 12\), summaries of \d+ to 12 tokens \(8 cut to 5\)",
                        few.prompts.sizes(few.train))


def test_the_checks_of_the_original_fail_when_a_weight_was_written_to(lab_of, example):
    lab, untouched = lab_of(*SHORT, "--steps", "1"), example("lab.flan_lab").untouched
    assert not lab.base.attachments
    original = lab.original()
    _, trained_copy = lab.instruct()
    _, lora = lab.peft()
    assert [holds for _, holds in untouched(lab, original, lora)] == [True, True]
    assert lora.state == "plugged"
    lab.base.load_state(trained_copy.state())           # as if full fine-tuning had been done in place
    assert [holds for _, holds in untouched(lab, original, lora)] == [False, False]


def test_the_check_of_a_file_fails_when_the_file_is_another(lab_of, example, tmp_path):
    lab, reloaded = lab_of(*SHORT, "--steps", "1"), example("lab.flan_run").reloaded
    row, lora = lab.peft()
    logits = lab.first_logits(lab.base)
    lora.save(tmp_path / "first.safetensors")
    assert reloaded(lab, tmp_path / "first.safetensors", logits, row.ids)[1]
    next(iter(lora.parameters.values())).data += 1e-3
    lora.save(tmp_path / "second.safetensors")
    assert not reloaded(lab, tmp_path / "second.safetensors", logits, row.ids)[1]


def test_a_difference_in_points_is_not_one_in_percent(example):
    """Of the figure: .4216 and .2334 are 18.82 points apart; +80.63 % is relative, and so is -3.20 %."""
    rouge = example("lab.rouge")

    def alike(score):
        return {kind: [score, score] for kind in rouge.KINDS}

    full = rouge.differences(alike(42.16), alike(23.34))["rouge1"]
    assert (round(full.points, 2), round(full.percent, 2)) == (18.82, 80.63)
    assert full.interval == pytest.approx((18.82, 18.82))
    lora = rouge.differences(alike(40.81), alike(42.16))["rouge1"]
    assert (round(lora.points, 2), round(lora.percent, 2)) == (-1.35, -3.20)
    assert rouge.differences(alike(1.0), alike(0.0))["rouge1"].percent is None
    mixed = rouge.differences({kind: [10.0, 50.0] for kind in rouge.KINDS}, alike(20.0))["rougeL"]
    assert mixed.points == 10 and mixed.interval == (-10, 30)


# ---- ROUGE


@pytest.mark.parametrize("answer, reference, rouge1, rouge2, rougel", [
    ("It is very cold outside.", "It is cold outside.", 88.89, 57.14, 88.89),
    ("cold cold cold cold", "It is cold outside.", 25, 0, 25),
    ("outside cold it is", "It is cold outside.", 100, 33.33, 50),
    ("She was running", "she runs", 80, 0, 80),                 # the stemmer makes run of both; 40 without it
    ("", "It is cold outside.", 0, 0, 0)])
def test_rouge_gives_the_golden_figures(example, answer, reference, rouge1, rouge2, rougel):
    rouge = example("lab.rouge")
    found = rouge.mean(rouge.scores([answer], [reference]))
    assert found == pytest.approx({"rouge1": rouge1, "rouge2": rouge2, "rougeL": rougel, "rougeLsum": rougel}, abs=5e-3)


def test_rouge_of_several_is_the_mean_of_their_f1(example):
    rouge = example("lab.rouge")
    two = rouge.scores(["It is very cold outside.", "cold cold cold cold"], ["It is cold outside."] * 2)
    assert rouge.mean(two)["rouge1"] == pytest.approx((800 / 9 + 25) / 2)
    with pytest.raises(ValueError):
        rouge.scores(["one answer"], [])


# ---- the dialogues


def test_the_dozen_dialogues_are_the_same_in_both_files(example):
    read = example("lab.dialogues").read
    rows = read(DIALOGUES)
    assert rows == read(DIALOGUES.with_suffix(".jsonl")) and len(rows) == 12
    assert len({row.id for row in rows}) == len({row.words for row in rows}) == 12
    assert all(row.dialogue.count("#Person") == 3 and "\n" in row.dialogue and row.topic for row in rows)


def test_no_dialogue_is_on_both_sides_of_a_split_even_if_it_has_several_summaries(example):
    dialogues = example("lab.dialogues")
    rows = [dialogues.Dialogue(f"dialogue {i // 3}" + " " * (i % 3 > 1), f"summary {i}", str(i)) for i in range(30)]
    for seed in range(5):
        train, test = dialogues.split(rows, 4, None, seed)
        assert len(test) == 4 == len({row.words for row in test})
        assert len(train) == 18 and not {row.words for row in train} & {row.words for row in test}
    assert dialogues.split(rows, 4, 5, 0)[0] == dialogues.split(rows, 4, None, 0)[0][:5]
    assert list(map(len, dialogues.split(rows, None, None, 0))) == [24, 2]
    assert dialogues.split(rows, 4, None, 1) != dialogues.split(rows, 4, None, 0)
    train, test = dialogues.split(rows, rows[:2], None, 0)                      # test rows of a file of their own
    assert test == rows[:2] and len(train) == 27


def test_other_columns_can_be_named_and_a_test_file_can_be_given(program, lab_of, tmp_path):
    text = DIALOGUES.read_text("utf-8").replace("id,topic,dialogue,summary", "name,topic,talk,gist")
    (tmp_path / "train.csv").write_text("\ufeff" + text, "utf-8")              # with the mark that Excel writes
    (tmp_path / "test.jsonl").write_text('{"talk": "#Person1#: Thank you,", "gist": "#Person1# asks"}\n\n', "utf-8")
    lab = lab_of("--test", str(tmp_path / "test.jsonl"), "--train", "7", "--dialogue-column", "talk",
                 "--summary-column", "gist", data=tmp_path / "train.csv")
    assert len(lab.train) == 7 and [row.id for row in lab.test] == ["1"]


# ---- errors


def without(name):
    return lambda folder: (folder / name).unlink()


def renamed(name, new):
    return lambda folder: (folder / name).rename(folder / new)


def written(name, text):
    return lambda folder: (folder / name).write_text(text, "utf-8")


def of_another_model(folder):
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text("utf-8"))
    words = values["model"]["vocab"]
    words[1], words[7] = words[7], words[1]
    values["added_tokens"][1]["id"] = 7
    file.write_text(json.dumps(values), "utf-8")


def a_smaller_table(folder):
    config = dataclasses.replace(minipeft.T5.from_pretrained(folder).config, vocab_size=40)
    minipeft.T5(config, numpy.random.default_rng(0)).save_pretrained(folder)


HEAD = "dialogue,summary\n"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize("change, more, message", [
    (("none.csv", None, None), [], r"there is no file .*none.csv; expected a .csv or .jsonl file with the columns "
     r"'dialogue' and 'summary' \(nothing is downloaded\)"),
    (("a.txt", "x", None), [], r"a.txt ends in '.txt'; expected .csv or .jsonl"),
    (("a.csv", "id,dialog,summary\n1,x,y\n", None), [], r"row 1 has no column 'dialogue'; it has 'id', 'dialog', "
     r"'summary'. The options --dialogue-column"),
    (("a.jsonl", '{"dialogue": "x", "gist": "y"}\n', None), [], r"row 1 has no column 'summary'; it has 'dialogue', "),
    (("a.csv", HEAD + "x,y\nx,\n", None), [], r"a.csv: row 2 has '' as 'summary'; expected text"),
    (("a.csv", HEAD + "x\n", None), [], r"a.csv: row 1 has None as 'summary'; expected text"),
    (("a.jsonl", '{"dialogue": "x", "summary": 3}\n', None), [], r"row 1 has 3 as 'summary'; expected text"),
    (("a.csv", HEAD + "Hello, you,y\n", None), [], r"line 2 has more fields than the header: a text with commas"),
    (("a.csv", HEAD + '"x"y,z\n', None), [], r"a.csv: line 2: "),
    (("a.jsonl", '{"dialogue": "x"\n', None), [], r"a.jsonl: line 1 is not JSON: "),
    (("a.jsonl", '["x", "y"]\n', None), [], r"line 1 is \['x', 'y'\]; expected an object with a dialogue and "),
    (("a.jsonl", "[" * 100_000 + "\n", None), [], r"a.jsonl: line 1 is not JSON: "),
    (("a.csv", HEAD, None), [], r"a.csv holds no row; expected dialogues and summaries"),
    (("a.csv", "dialogue,summary\n\udcff,y\n", None), [], r"a.csv is not text in UTF-8: "),
    (("a.csv", LFS, None), [], r"a.csv is a Git LFS pointer"),
    (("a.csv", HEAD + "x,y\nz,y\n", None), ["--test", "2"], r"2 rows with 2 different dialogues are too few for 2 test "
     r"dialogues and 1 others to train on"),
    ((None, None, without("config.json")), [], r"holds no config.json: expected a folder with config.json and "),
    ((None, None, renamed("model.safetensors", "pytorch_model.bin")), [], r"pytorch_model.bin is a pickle, which can "
     r"run code when it is opened; .* convert it once"),
    ((None, None, renamed("tokenizer.json", "spiece.model")), [], r"holds no tokenizer.json, only spiece.model. "
     r"Convert it once, .*: AutoTokenizer.from_pretrained\(folder\).save_pretrained\(folder\)"),
    ((None, None, without("tokenizer.json")), [], r"holds no tokenizer.json; expected the tokenizer of the model"),
    ((None, None, written("tokenizer.json", "{}")), [], r"tokenizer.json is not a file of the tokenizers package: "),
    ((None, None, written("tokenizer.json", LFS)), [], r"tokenizer.json is a Git LFS pointer"),
    ((None, None, written("model.safetensors", LFS)), [], r"model.safetensors is a Git LFS pointer"),
    ((None, None, of_another_model), [], r"</s> has the id 7; expected 1, the model's eos_token_id: it is the "
     r"tokenizer of another model"),
    ((None, None, a_smaller_table), ["--rank", "8"], r"the token '▁\S+' has the id \d+, and the model's table only 40 "
     r"rows: tokenizer.json is that of another model"),
    ((None, None, None), ["--rank", "65"], r"rank"),
    ((None, None, None), ["--max-source", "7"], r"max_source is 7; expected more than 7, the tokens of the template")])
def test_a_file_that_does_not_fit_is_named_before_anything_is_trained_or_written(program, folder, tmp_path, capsys,
                                                                                 change, more, message):
    name, text, model = change
    data, used = DIALOGUES if name is None else tmp_path / name, folder
    if text is not None:
        data.write_bytes(text.encode("utf-8", "surrogateescape"))
    if model is not None:
        used = tmp_path / "copy"
        shutil.copytree(folder, used)
        model(used)
    assert program.main(["--model", str(used), "--data", str(data), "--out", str(tmp_path / "out"), *more]) == 2
    said = capsys.readouterr()
    assert re.search(f"error: .*{message}", said.err) and not said.out and not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv, message", [
    ([], "expected --model DIR and --data FILE, or --dry-run"), (["--model", "x"], "expected --model DIR and --data"),
    (["--dry-run", "--batch", "0"], "0 is too small; expected an integer >= 1"),
    (["--dry-run", "--lr", "-1"], "-1 is out of range"), (["--dry-run", "--test", "0"], "0 is too small")])
def test_arguments_out_of_range_are_refused(program, capsys, argv, message):
    with pytest.raises(SystemExit, match="2"):
        program.arguments(argv)
    assert message in capsys.readouterr().err


def test_a_package_that_is_not_installed_is_named_with_the_extra_that_brings_it(program, monkeypatch, capsys):
    monkeypatch.setattr(program.importlib.util, "find_spec", lambda name: None if name == "rouge_score" else name)
    assert program.main(["--model", "x", "--data", "y"]) == 2
    assert capsys.readouterr().err == ("this program needs rouge-score: pip install -e '.[lab]', in the root of the "
                                       "repository\n")
    assert program.missing(program.DRY) == []
    extra = re.search(r"^lab =\n((?:    .*\n)+)", (EXAMPLES.parent / "setup.cfg").read_text("utf-8"), re.MULTILINE)[1]
    assert set(program.NEEDED.values()) == {line.split()[0] for line in extra.splitlines()}


def test_the_help_needs_none_of_these_packages(program):
    hidden = "; ".join(f"sys.modules[{name!r}] = None" for name in program.NEEDED)
    code = f"import runpy, sys; {hidden}; sys.argv = ['lab', '--help']; runpy.run_path({str(program.__file__)!r}, " \
           "run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "five pitfalls" in done.stdout, done.stderr


# ---- the dry run


def test_flan_t5_base_and_its_lora_have_the_numbers_of_the_lab(program, example):
    base, run = example("lab.flan_base"), example("lab.flan_run")
    args = program.arguments(["--dry-run"])
    assert (args.rank, args.alpha, args.batch) == (32, 32, 2)
    model = minipeft.T5(base.CONFIG, None)
    full = base.row_of("full", model, minipeft.select(model, ".*"))
    lora = base.row_of("LoRA", model, minipeft.attach(model, run.lora_of(args), numpy.random.default_rng(0)))
    assert (full.trainable, full.all, lora.trainable, lora.all) == (247577856, 247577856, 3538944, 251116800)
    assert run.lora_numbers(model, args) == 3538944 and f"{lora.percent:.2f}" == "1.41"
    assert full.training == 3 * 4 * 247577856

    def failing(lora, full):
        return [claim for claim, holds in base.claims_about([lora, full], 3538944, base.CONFIG, 32) if not holds]

    assert failing(lora, full) == []
    assert len(failing(dataclasses.replace(lora, trainable=3538945), full)) == 2
    assert len(failing(lora, dataclasses.replace(full, trainable=247577855))) == 1
    assert len(failing(dataclasses.replace(lora, peak=2), dataclasses.replace(full, peak=2))) == 1


@pytest.mark.parametrize("free, made", [(2 ** 40, True), (2 ** 20, False), (None, False)])
def test_the_dry_run_measures_a_step_of_each_kind_where_memory_allows(program, example, tmp_path, monkeypatch,
                                                                      capsys, free, made):
    base = example("lab.flan_base")
    monkeypatch.setattr(base, "free_memory", lambda: free)
    args = program.arguments(["--dry-run", "--rank", "4", "--batch", "1", "--max-source", "6", "--max-target", "4",
                              "--out", str(tmp_path)])
    tiny = dataclasses.replace(base.CONFIG, vocab_size=512, d_model=96, d_kv=8, d_ff=192, num_layers=1,
                               num_decoder_layers=1)           # whose weights are larger than the activations
    assert base.run(base.Base(args, tiny)) == 0
    found = json.loads((tmp_path / "dry_run.json").read_text("utf-8"))
    lora, full = found["rows"]
    assert lora["seconds"] > 0 and lora["peak"] > lora["training"] > 0
    assert (full["peak"] is not None) == made == (full["seconds"] is not None)
    assert not made or full["training"] < full["peak"] < 1.5 * full["training"]
    assert ("is not made: it needs about" not in capsys.readouterr().out) == made


def test_the_table_of_the_page_is_that_of_the_recorded_dry_run(example):
    base, tables = example("lab.flan_base"), example("lab.tables")
    run = json.loads((EXAMPLES / "recorded" / "flan_t5_dry_run.json").read_text("utf-8"))
    assert all(run["claims"].values()) and len(run["claims"]) == 4
    assert [run[name] for name in ("batch", "source", "target", "rank", "threads")] == [2, 128, 32, 32, "1"]
    page, rows = (EXAMPLES / "README.md").read_text("utf-8"), [base.Row(**row) for row in run["rows"]]
    assert f"<!-- dry run -->\n{tables.as_markdown(rows, base.COLUMNS[:-1])}\n" in page
    assert round(rows[1].peak / rows[0].peak) == 7 and "a seventh of the memory" in page
    assert f"which take {4 * rows[1].all / 2 ** 20:.0f} MiB" in page


def test_free_memory_is_what_the_system_and_the_container_leave(example, tmp_path, monkeypatch):
    memory = example("lab.free_memory")
    for name, text in (("meminfo", "MemTotal: 9 kB\nMemAvailable:    5 kB\n"), ("max", "4000\n"), ("now", "1000\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "_SYSTEM", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_GROUP", (tmp_path / "max", tmp_path / "now"))
    assert memory.free_memory() == 3000
    (tmp_path / "max").write_text("max\n")
    assert memory.free_memory() == 5 * 1024
    (tmp_path / "meminfo").unlink()
    assert memory.free_memory() is None
