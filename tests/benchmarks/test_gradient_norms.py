"""The benchmark of gradient norms: its records and its table, and that alpha is what makes them grow."""

from benchmarks import gradient_norms, results


def test_every_way_has_a_record_and_a_line(tmp_path, capsys):
    out = tmp_path / "norms.json"
    assert gradient_norms.main(["--people", "6", "--steps", "2", "--seeds", "1", "--out", str(out)]) == 0
    records = {row["way"]: row for row in results.read(out)["records"]}
    assert list(records) == list(gradient_norms.WAYS)
    norms = {way: row["norms"] for way, row in records.items()}
    assert norms["SDM (alpha 0)"][0] == norms["alpha from 0 to 10"][0]
    assert norms["SDM (alpha 0)"][0] < norms["alpha 1"][0] < norms["alpha 10"][0]
    assert norms["alpha 10"][0] == norms["alpha 10, clipped to 100"][0] > norms["alpha 10, detach_weight"][0]
    assert records["alpha 10"]["values"][0] == records["alpha 10, detach_weight"]["values"][0]
    assert all(len(row["norms"]) == len(row["values"]) == 2 and row["moved"] > 0 for row in records.values())
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(gradient_norms.WAYS)
