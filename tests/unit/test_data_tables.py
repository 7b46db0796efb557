"""A site's own files as examples."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

from tacit.data.heart_disease import COLUMNS, FILES, load_heart_disease
from tacit.data.tables import Table, check_examples, read_csv, read_idx, read_numpy, read_parquet
from tacit.errors import DataError, InputError

HEART = Table(
    target="num",
    columns=COLUMNS,
    drop=("slope", "ca", "thal"),
    missing="?",
    categories={"cp": (1, 2, 3, 4), "restecg": (0, 1, 2)},
    above=0,
)


@pytest.mark.skipif("TACIT_DATA" not in os.environ, reason="the heart disease files are not here: set TACIT_DATA")
def test_a_hospitals_file_by_the_general_reader_is_what_the_special_one_makes_of_it():
    for hospital in load_heart_disease():
        path = Path(os.environ["TACIT_DATA"], "heart-disease", FILES[hospital.name].name)
        examples = read_csv(path, HEART)
        rows = {tuple(row) for row in examples.inputs.tolist()}
        assert len(examples) == len(hospital.train) + len(hospital.test)
        assert {tuple(row) for row in torch.cat([hospital.train.inputs, hospital.test.inputs]).tolist()} == rows
        assert int(examples.targets.sum()) == int(hospital.train.targets.sum() + hospital.test.targets.sum())


def csv_file(tmp_path, text):
    path = tmp_path / "table.csv"
    path.write_text(text)
    return path


def test_a_header_names_columns_and_rows_with_gaps_are_left_out(tmp_path):
    path = csv_file(tmp_path, "age,sex,outcome,id\n50,1,no,a\n60,0,yes,\n,1,no,c\n70,1,yes,d\n")
    examples = read_csv(path, Table("outcome", drop=("id",), classes=("no", "yes")))
    assert examples.inputs.tolist() == [[50, 1], [60, 0], [70, 1]]
    assert examples.targets.tolist() == [0, 1, 1]
    chosen = read_csv(path, Table("outcome", features=("sex",), classes=("no", "yes")))
    assert chosen.inputs.tolist() == [[1], [0], [1], [1]]


@pytest.mark.parametrize(
    ("text", "table", "complaint"),
    [
        ("a,b\n1,x\n", Table("b"), "line 2, column 'b': expected a number"),
        ("a,b\n1,0\nsecret,0\n", Table("b"), "line 3, column 'a': expected a number"),
        ("a,b\n1,0\n1\n", Table("b"), "line 3: 1 cells, expected 2"),
        ("a,b\n1,0.5\n", Table("b"), "no class number"),
        ("a,b\n1,2\n", Table("b", classes=("0", "1")), "none of 0, 1"),
        ("a,b\n7,0\n", Table("b", categories={"a": (1, 2)}), "column 'a': expected one of 1, 2"),
        ("a,b\ninf,0\n", Table("b"), "expected a number"),
        ("a,b\n,0\n", Table("b"), "no row has all of a, b"),
        ("", Table("b"), "is empty"),
        ("a\n1\n", Table("b"), "no column 'b'"),
    ],
)
def test_damage_is_named_by_line_and_column_and_never_by_value(tmp_path, text, table, complaint):
    with pytest.raises(DataError, match=complaint) as caught:
        read_csv(csv_file(tmp_path, text), table)
    assert "secret" not in str(caught.value)


def test_settings_that_contradict_themselves_are_refused():
    with pytest.raises(InputError, match="which is it"):
        Table("a", drop=("a",))
    with pytest.raises(InputError, match="give one"):
        Table("a", classes=("0", "1"), above=0)


def test_parquet_is_the_same_table(tmp_path):
    path = tmp_path / "table.parquet"
    columns = {"age": [50.0, None, 70.0], "sick": [False, True, True], "id": ["a", "b", None]}
    parquet.write_table(pyarrow.table(columns), path)
    examples = read_parquet(path, Table("sick", drop=("id",)))
    assert examples.inputs.tolist() == [[50], [70]]
    assert examples.targets.tolist() == [0, 1]
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_parquet(path, Table("sick"))


def idx(*shape: int) -> bytes:
    head = struct.pack(f">{1 + len(shape)}I", 0x800 | len(shape), *shape)
    return gzip.compress(head + bytes(range(int(np.prod(shape)))))


def test_images_and_labels_of_idx_files(tmp_path):
    (tmp_path / "x").write_bytes(idx(3, 2, 2))
    (tmp_path / "y").write_bytes(idx(3))
    examples = read_idx(tmp_path / "x", tmp_path / "y")
    assert examples.inputs.shape == (3, 1, 2, 2)
    assert float(examples.inputs.max()) == pytest.approx(11 / 255)
    (tmp_path / "y").write_bytes(idx(4))
    with pytest.raises(DataError, match="3 inputs"):
        read_idx(tmp_path / "x", tmp_path / "y")
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(tmp_path / "none", tmp_path / "y")


def test_arrays_of_numpy_but_no_objects(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(6).reshape(3, 2))
    np.save(tmp_path / "y.npy", np.array([0, 1, 1], np.uint8))
    examples = read_numpy(tmp_path / "x.npy", tmp_path / "y.npy")
    assert examples.inputs.dtype == torch.float32
    assert examples.targets.tolist() == [0, 1, 1]
    np.save(tmp_path / "y.npy", np.array([0.0, 1, 1]))
    with pytest.raises(DataError, match="fractions"):
        read_numpy(tmp_path / "x.npy", tmp_path / "y.npy")
    np.save(tmp_path / "y.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read as a NumPy array"):
        read_numpy(tmp_path / "x.npy", tmp_path / "y.npy")


def test_examples_that_do_not_fit_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.array([[0.0, np.nan]]))
    np.save(tmp_path / "y.npy", np.array([1]))
    examples = read_numpy(tmp_path / "x.npy", tmp_path / "y.npy")
    with pytest.raises(DataError, match="not all finite"):
        check_examples(examples, (2,), 2)
    with pytest.raises(DataError, match=r"shape \(2,\) here, expected \(3,\)"):
        check_examples(examples, (3,), 2)
    with pytest.raises(DataError, match="classes 0 to 0"):
        check_examples(type(examples)(torch.zeros(1, 2), examples.targets), (2,), 1)
