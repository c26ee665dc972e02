"""Two subjects image by image: intervals and tests against what they must come to, and what may not be compared."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fastgen.evaluation import compare, per_image
from fastgen.evaluation.per_image import PerImage
from tests.reports import made_up_rows

PROMPTS = "ab" * 32


def normal(n: int, seed: int, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    return mean + std * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The bootstrap


def test_the_bootstrap_interval_is_that_of_the_normal_limit():
    n, mean, std = 4000, 0.3, 2.5
    d = normal(n, 1, mean, std)
    low, high = compare.bootstrap(d)
    half = 1.959964 * float(d.std(correction=0)) / math.sqrt(n)
    assert low == pytest.approx(float(d.mean()) - half, abs=0.04 * half)
    assert high == pytest.approx(float(d.mean()) + half, abs=0.04 * half)
    assert compare.bootstrap(d) == (low, high), "seeded"
    assert compare.bootstrap(d, seed=1) != (low, high)


def test_the_bootstrap_of_two_images_has_three_values():
    d = torch.tensor([-1.0, 3.0], dtype=torch.float64)
    assert compare.bootstrap(d) == (-1.0, 3.0)  # a quarter of the resamplings each


def test_the_bootstrap_covers_as_often_as_it_says():
    hits = 0
    for seed in range(300):
        low, high = compare.bootstrap(normal(200, 1000 + seed, 0.7, 1.3), resamples=500, seed=seed)
        hits += low <= 0.7 <= high
    assert abs(hits / 300 - 0.95) < 3.5 * math.sqrt(0.95 * 0.05 / 300)


# Sign flips


@pytest.mark.parametrize("n", [1, 4, 10, 13])
def test_a_constant_shift_is_as_rare_as_both_extreme_signs(n):
    assert compare.sign_flips(torch.full((n,), 0.37, dtype=torch.float64)) == pytest.approx(2 / 2**n, rel=1e-12)


def test_few_images_are_flipped_in_all_ways():
    # |±1 ± 2 ± 4| >= 3: of the sums ±7, ±5, ±3, ±1 six of eight
    assert compare.sign_flips(torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)) == 6 / 8


@pytest.mark.parametrize("n", [5, 500])
def test_equal_sides_have_p_1(n):
    assert compare.sign_flips(torch.zeros(n, dtype=torch.float64)) == 1.0


def test_many_images_are_flipped_at_random_and_p_is_never_0():
    d = normal(3000, 3, 0.5)
    assert compare.sign_flips(d) == 1 / (1 + compare.RESAMPLES)
    weak = normal(3000, 4, 0.0)
    weak += 2.0 / math.sqrt(3000) - weak.mean()  # two standard errors: p = 0.0455 in the normal limit
    z = float(weak.mean() / (weak.square().mean().sqrt() / math.sqrt(3000)))
    assert compare.sign_flips(weak) == pytest.approx(math.erfc(z / math.sqrt(2)), abs=4 * math.sqrt(0.0455 / 10_000))


def test_chunks_give_the_same_as_one_draw(monkeypatch):
    d = normal(50, 5, 0.2)
    whole = compare.sign_flips(d), compare.bootstrap(d)
    monkeypatch.setattr(compare, "_CHUNK", 50 * 777)
    parts = compare.sign_flips(d), compare.bootstrap(d)
    assert parts[0] == pytest.approx(whole[0], abs=0.02)
    assert parts[1] == pytest.approx(whole[1], abs=0.02)


def test_p_is_uniform_where_neither_is_better():
    ps = torch.tensor([compare.sign_flips(normal(40, 100 + i), resamples=400, seed=i) for i in range(400)])
    for level in (0.05, 0.25, 0.5, 0.75):
        assert abs(float((ps <= level).double().mean()) - level) < 3.5 * math.sqrt(level * (1 - level) / 400)


# McNemar and Holm


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (3, 3), (2, 9), (10, 25), (400, 333), (15000, 14000)])
def test_mcnemar_is_the_binomial_test(b, c):
    stats = pytest.importorskip("scipy.stats")
    want = stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert compare.mcnemar(b, c) == pytest.approx(want, rel=1e-9)
    assert compare.mcnemar(c, b) == compare.mcnemar(b, c)


def test_right_or_wrong_is_tested_by_mcnemar():
    a = torch.tensor([1.0, 1, 0, 0, 0, 0, 0, math.nan, 1])
    b = torch.tensor([1.0, 0, 1, 1, 1, 1, 1, 1, math.nan])
    found = compare.paired(a, b)
    assert (found["test"], found["only_a"], found["only_b"], found["num_images"]) == ("McNemar", 1, 5, 7)
    assert found["p"] == pytest.approx(2 * (1 + 6) / 2**6)
    assert found["difference"] == pytest.approx(4 / 7)


def test_holm():
    assert compare.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert compare.holm([0.6, 0.9]) == [1.0, 1.0]
    assert compare.holm([0.2]) == [0.2]
    assert compare.holm([]) == []


def test_nothing_in_common_is_no_comparison():
    nan = torch.tensor([math.nan, 1.0])
    assert compare.paired(nan, nan.flip(0)) == {}


# From folders


def kept(folder, names=("teacher, 50 steps", "dmd2, 1 step"), shift=2.0, n=200):
    """Results with scores by image of two subjects; the second is ``shift`` higher in clip_score."""
    folder.mkdir(exist_ok=True)
    rows = [row for row in made_up_rows() if row["name"] in names or row["role"] == "data"]
    for row in rows:
        if row["role"] != "data":
            row["protocol"] |= {"prompts": PROMPTS, "seed": 0}
        row["intervals"] = {"fid": [row["fid"] - 0.5, row["fid"] + 0.5]}
    (folder / "results.json").write_text(json.dumps(rows))
    base = normal(n, 7, 30.0, 3.0)
    for i, name in enumerate(names):
        right = (torch.arange(120) % 10 < 6 + 3 * i).double()
        own = base + shift * i + normal(n, 8 + i, 0.0, 0.5)
        per_image.save(folder / "per_image" / f"{i}.json", PerImage(name, PROMPTS, 0, {"clip_score": own}))
        # GenEval has prompts of its own
        other = PerImage(name, "ef" * 32, 0, {"geneval_position": right})
        per_image.save(folder / "per_image" / "geneval" / f"{i}.json", other)
    return folder


def test_a_paired_comparison_of_two_rows(tmp_path):
    out = kept(tmp_path / "run")
    a, b = compare.sides("teacher, 50 steps", "dmd2, 1 step", out)
    rows = {row["value"]: row for row in compare.compare(a, b)}
    json.dumps(list(rows.values()), allow_nan=False)
    clip = rows["clip_score"]
    assert clip["test"] == "sign flips"
    assert clip["interval"][0] < 2.0 < clip["interval"][1]
    assert clip["interval"][1] - clip["interval"][0] < 0.25, "the pairing removes what the prompts vary by"
    position = rows["geneval_position"]
    assert (position["only_a"], position["only_b"]) == (0, 36)
    assert position["p"] == pytest.approx(2 / 2**36)
    assert position["p_adjusted"] == pytest.approx(4 / 2**36)
    assert rows["fid"]["test"] is None
    assert rows["fid"]["interval_b"] == pytest.approx([7.255, 8.255])
    text = compare.text(a, b, list(rows.values()))
    assert text.startswith("dmd2, 1 step against teacher, 50 steps\n\nImages of the same prompts and seeds in pairs")
    assert "GenEval, position: 0.900 against 0.600, difference +0.3 [" in text
    assert "] on 120 images; p = 2.9e-11, adjusted 5.8e-11 (McNemar" in text
    assert "(McNemar; 36 images only the first gets right, 0 only the second): dmd2, 1 step is better." in text
    assert "FID: 7.75 [7.25, 8.25] against 6.32 [5.82, 6.82]; the intervals do not overlap." in text
    assert "Seconds per image: 0.0337 against 1.93; 57.4 times as fast." in text


def test_a_subject_compared_with_itself(tmp_path):
    out = kept(tmp_path / "run")
    a, b = compare.sides(f"{out}:dmd2, 1 step", f"{out}:dmd2, 1 step")
    rows = [row for row in compare.compare(a, b) if row["test"]]
    assert [(row["difference"], row["interval"], row["p"]) for row in rows] == [(0.0, [0.0, 0.0], 1.0)] * 2
    assert compare.text(a, b, rows).count("no difference shown") == 2


def test_two_folders_stand_for_their_students(tmp_path):
    one, other = kept(tmp_path / "one"), kept(tmp_path / "other", shift=-1.0)
    a, b = compare.sides(str(one), str(other))
    assert (a.name, b.name) == ("dmd2, 1 step", "dmd2, 1 step")
    [clip] = [row for row in compare.compare(a, b) if row["value"] == "clip_score"]
    assert clip["difference"] == pytest.approx(-3.0)
    a, b = compare.sides(str(one), "teacher, 50 steps")  # a bare name is in the other's folder
    assert (a.name, b.name) == ("dmd2, 1 step", "teacher, 50 steps")


def test_without_scores_by_image_there_is_no_test(tmp_path):
    out = kept(tmp_path / "run")
    for path in (out / "per_image").rglob("*.json"):
        path.unlink()
    a, b = compare.sides("teacher, 50 steps", "dmd2, 1 step", out)
    rows = compare.compare(a, b)
    assert not any(row["test"] for row in rows)
    assert "No scores by image are kept for both; `fastgen evaluate` keeps them in per_image/." in compare.text(
        a, b, rows
    )


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("prompts", "cd" * 32, "prompts: abababababab…; cdcdcdcdcdcd…"),
        ("seed", 1, "seed: 0; 1"),
        ("num_images", 500, "num_images: 1000; 500"),
    ],
)
def test_other_prompts_seeds_or_numbers_are_refused(tmp_path, name, value, told):
    out = kept(tmp_path / "run")
    rows = json.loads((out / "results.json").read_text())
    rows[-1]["protocol"][name] = value
    (out / "results.json").write_text(json.dumps(rows))
    sides = compare.sides("teacher, 50 steps", "dmd2, 1 step", out)
    with pytest.raises(ValueError, match=f"cannot be compared in pairs: they differ in .*{told}"):
        compare.compare(*sides)


def test_scores_of_another_seed_than_the_row_says_are_refused(tmp_path):
    out = kept(tmp_path / "run")
    kept_scores = per_image.load(out / "per_image" / "1.json")
    per_image.save(out / "per_image" / "1.json", PerImage(kept_scores.subject, PROMPTS, 5, kept_scores.values))
    with pytest.raises(ValueError, match="they differ in seed: 0; 5"):
        compare.compare(*compare.sides("teacher, 50 steps", "dmd2, 1 step", out))
    short = {"clip_score": kept_scores.values["clip_score"][:7]}
    per_image.save(out / "per_image" / "1.json", PerImage(kept_scores.subject, "00" * 32, 0, short))
    with pytest.raises(
        ValueError, match="they differ in prompts: abababababab…; 000000000000…, in num_images: 200; 7"
    ):
        compare.compare(*compare.sides("teacher, 50 steps", "dmd2, 1 step", out))


def test_another_machine_may_be_compared_but_not_its_protocol_of_features(tmp_path):
    out = kept(tmp_path / "run")
    rows = json.loads((out / "results.json").read_text())
    rows[-1]["protocol"]["device"] = "cuda (H100)"
    (out / "results.json").write_text(json.dumps(rows))
    assert compare.compare(*compare.sides("teacher, 50 steps", "dmd2, 1 step", out))
    rows[-1]["protocol"]["metrics"]["fid"]["resize"]["resample"] = 2
    (out / "results.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="they differ in fid resize resample: 3; 2"):
        compare.compare(*compare.sides("teacher, 50 steps", "dmd2, 1 step", out))


def test_what_is_no_subject(tmp_path):
    out = kept(tmp_path / "run")
    with pytest.raises(ValueError, match=r"nowhere: neither a folder with a results\.json nor FOLDER:NAME"):
        compare.sides("nowhere", "dmd2, 1 step")
    with pytest.raises(ValueError, match="has no pipeline 'dmd2, 2 steps'; did you mean 'dmd2, 1 step'"):
        compare.sides(str(out), "dmd2, 2 steps")
    with pytest.raises(ValueError, match="has no pipeline 'real images'"):
        compare.sides(str(out), "real images")
    rows = json.loads((out / "results.json").read_text())
    (out / "results.json").write_text(json.dumps([*rows, rows[-1] | {"name": "lcm, 4 steps"}]))
    with pytest.raises(ValueError, match=r"holds several pipelines; say .*:NAME with one of teacher, 50 steps, dmd2"):
        compare.sides(str(out), "dmd2, 1 step")


def test_nothing_to_compare():
    bare = [compare.Side({"name": n, "role": "student", "steps": 1, "protocol": {}}) for n in "ab"]
    with pytest.raises(ValueError, match="'a' and 'b' have no value in common; evaluate both by the same metrics"):
        compare.compare(*bare)


# Scores by image on disk


def test_scores_come_back_as_they_were(tmp_path):
    values = {"x": torch.tensor([0.1, math.nan, 1e-300, -3.0], dtype=torch.float64), "y": torch.ones(4)}
    per_image.save(tmp_path / "per_image" / "a.json", PerImage("a b", PROMPTS, None, values))
    per_image.save(tmp_path / "per_image" / "set" / "a.json", PerImage("a b", "0", None, {"z": torch.ones(2)}))
    found, other = per_image.load_all(tmp_path)["a b"]
    assert list(other.values) == ["z"]
    assert (found.subject, found.prompts, found.seed, len(found)) == ("a b", PROMPTS, None, 4)
    torch.testing.assert_close(found.values["x"], values["x"], rtol=0, atol=0, equal_nan=True)
    assert found.values["y"].dtype == torch.float64
    assert sorted(path.name for path in (tmp_path / "per_image").iterdir()) == ["a.json", "set"]
    assert per_image.load_all(tmp_path / "elsewhere") == {}


def test_unusable_scores(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(ValueError, match=r"must be \[N\] of one N: y is \[2\], N 3"):
        per_image.save(path, PerImage("a", PROMPTS, 0, {"x": torch.ones(3), "y": torch.ones(2)}))
    with pytest.raises(ValueError, match="per-image value x of 'a' is infinite; give NaN"):
        per_image.save(path, PerImage("a", PROMPTS, 0, {"x": torch.tensor([math.inf])}))
    assert not path.exists()
    good = {"version": 1, "subject": "a", "prompts": PROMPTS, "seed": 0, "num_images": 1, "values": {"x": [1.0]}}
    for damaged, told in (
        ("{", "Expecting property name"),
        (json.dumps(good | {"version": 2}), "version 2, not 1"),
        (json.dumps(good | {"num_images": 2}), "not 2 values each"),
        (json.dumps({"version": 1}), "'values'"),
        ("[]", "list indices"),
    ):
        path.write_text(damaged)
        with pytest.raises(
            ValueError, match=rf"a\.json: not per-image values \(.*{told}.*run `fastgen evaluate` again"
        ):
            per_image.load(path)
