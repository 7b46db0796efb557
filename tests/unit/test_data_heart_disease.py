"""The four hospitals: what the files hold, the split, standardisation, damage."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from tacit.data.examples import Examples
from tacit.data.heart_disease import FEATURES, FILES, Hospital, Moments, load_heart_disease, standardised
from tacit.errors import DataError, InputError


@pytest.fixture(scope="module")
def folder() -> Path:
    named = os.environ.get("TACIT_DATA")
    if not named or not (Path(named) / "heart-disease").is_dir():
        pytest.skip("needs the heart disease files: set TACIT_DATA to the folder that holds heart-disease/")
    return Path(named) / "heart-disease"


@pytest.fixture(scope="module")
def hospitals(folder: Path) -> tuple[Hospital, ...]:
    return load_heart_disease(folder)


def test_sizes_and_targets_are_those_published(hospitals: tuple[Hospital, ...]) -> None:
    """Sizes of Fed-Heart-Disease (Ogier du Terrail et al. 2022, table 1): 303, 261, 46 and 130 patients."""
    assert [hospital.name for hospital in hospitals] == list(FILES)
    assert [(len(h.train), len(h.test)) for h in hospitals] == [(199, 104), (172, 89), (30, 16), (85, 45)]
    for hospital in hospitals:
        for part in (hospital.train, hospital.test):
            assert part.inputs.dtype == torch.float32
            assert part.inputs.shape == (len(part), len(FEATURES)) == (len(part), 13)
            assert part.targets.dtype == torch.int64
            assert set(part.targets.tolist()) <= {0, 1}
    sick = [int(h.train.targets.sum() + h.test.targets.sum()) for h in hospitals]
    assert sick[0] == 139  # 164 of Cleveland's 303 are without the disease


def test_the_split_is_stratified_and_stays_the_same(folder: Path, hospitals: tuple[Hospital, ...]) -> None:
    for hospital, again in zip(hospitals, load_heart_disease(folder.parent), strict=True):
        assert torch.equal(hospital.train.inputs, again.train.inputs)
        shares = [float(part.targets.double().mean()) for part in (hospital.train, hospital.test)]
        assert shares[0] == pytest.approx(shares[1], abs=0.04)


def test_the_first_patient_of_cleveland(hospitals: tuple[Hospital, ...]) -> None:
    """63, male, typical angina, 145 mm Hg, 233 mg/dl, sugar high, hypertrophy, 150, no, 2.3; not ill."""
    row = dict(zip(FEATURES, [63, 1, 145, 233, 1, 150, 0, 2.3, 0, 0, 0, 0, 1], strict=True))
    wanted = torch.tensor(list(row.values()), dtype=torch.float32)
    found = [
        int(part.targets[i])
        for part in (hospitals[0].train, hospitals[0].test)
        for i in range(len(part))
        if torch.allclose(part.inputs[i], wanted)
    ]
    assert found == [0]


def test_moments_add_up_to_those_of_all_patients(hospitals: tuple[Hospital, ...]) -> None:
    pooled = torch.cat([hospital.train.inputs for hospital in hospitals]).double()
    first, *others = (Moments.of(hospital.train.inputs) for hospital in hospitals)
    together = sum(others, start=first)
    assert together.count == len(pooled) == 486
    assert torch.allclose(together.mean, pooled.mean(dim=0))
    assert torch.allclose(together.std, pooled.std(dim=0, correction=0))
    ready = torch.cat([standardised(h.train, together.mean, together.std).inputs for h in hospitals])
    assert torch.allclose(ready.mean(dim=0), torch.zeros(13), atol=1e-5)
    assert torch.allclose(ready.std(dim=0, correction=0), torch.ones(13), atol=1e-5)


def test_constant_features_become_zero() -> None:
    examples = Examples(torch.full((3, 2), 7.0), torch.zeros(3, dtype=torch.int64))
    moments = Moments.of(examples.inputs)
    assert torch.equal(standardised(examples, moments.mean, moments.std).inputs, torch.zeros(3, 2))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    for file in FILES.values():
        shutil.copyfile(folder / file.name, tmp_path / file.name)
    return tmp_path


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("67.0,1.0,4.0,160.0", "67.0,1.0,4.0", "has 13 values in line 2, expected 14"),
        ("67.0,1.0,4.0,160.0", "67.0,1.0,x,160.0", "has cp 'x' in line 2, expected one of 1, 2, 3, 4"),
        ("67.0,1.0,4.0,160.0", "67.0,1.0,4.0,nan", "has trestbps 'nan' in line 2, expected a number or ?"),
        ("1.5,2.0,3.0,3.0,2\n", "1.5,2.0,3.0,3.0,5\n", "has num '5' in line 2, expected one of 0, 1, 2, 3, 4"),
        ("67.0,1.0,4.0,160.0", "67.0,1.0,4.0,161.0", "is not the published processed.cleveland.data"),
        ("67.0,1.0,4.0,160.0", "67.0,1.0,4.0,?", "is not the published processed.cleveland.data"),
    ],
)
def test_damaged_files_are_named(copy: Path, old: str, new: str, complaint: str) -> None:
    path = copy / "processed.cleveland.data"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(DataError) as caught:
        load_heart_disease(copy)
    assert complaint in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_files_are_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "processed.va.data").unlink()
    with pytest.raises(DataError, match=r"processed\.va\.data is neither in"):
        load_heart_disease(copy)
    (copy / "processed.hungarian.data").write_bytes(b"")
    with pytest.raises(DataError, match="is not the published"):
        load_heart_disease(copy)
    monkeypatch.delenv("TACIT_DATA", raising=False)
    with pytest.raises(DataError, match="set TACIT_DATA"):
        load_heart_disease()


def test_statistics_of_another_shape() -> None:
    examples = Examples(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(InputError, match=r"mean of shape \(3,\)"):
        standardised(examples, torch.zeros(3), torch.ones(2))
    with pytest.raises(InputError, match="mean of no examples"):
        _ = Moments.of(torch.zeros(0, 2)).std
