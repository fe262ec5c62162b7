"""CoNLL-U: genuine shapes of the format, where words stand in captions, and broken files."""

from __future__ import annotations

from pathlib import Path

import pytest

from visling.data.annotations.parses import find_parses, read_parses
from visling.errors import DataError

CAPTION = "A girl's dog doesn't bark , it sleeps"
FILE = """\
# newdoc id = album
# sent_id = 17#0
# text = A girl's dog doesn't bark , it sleeps
1\tA\ta\tDET\tDT\t_\t2\tdet\t_\t_
2-3\tgirl's\t_\t_\t_\t_\t_\t_\t_\t_
2\tgirl\tgirl\tNOUN\tNN\t_\t4\tnmod:poss\t_\t_
3\t's\t's\tPART\tPOS\t_\t2\tcase\t_\t_
4\tdog\tdog\tNOUN\tNN\tNumber=Sing\t7\tnsubj\t_\t_
5-6\tdoesn't\t_\t_\t_\t_\t_\t_\t_\t_
5\tdoes\tdo\tAUX\tVBZ\t_\t7\taux\t_\t_
6\tnot\tnot\tPART\tRB\t_\t7\tadvmod\t_\t_
7\tbark\tbark\tVERB\tVB\t_\t0\troot\t_\t_
7.1\tloudly\t_\t_\t_\t_\t_\t_\t7:advmod\t_
8\t,\t,\tPUNCT\t,\t_\t10\tpunct\t_\t_
9\tit\tit\tPRON\tPRP\t_\t10\tnsubj\t_\t_
10\tsleeps\tsleep\tVERB\tVBZ\t_\t7\tparataxis\t_\t_

# sent_id = 17#1
1\tSnow\t_\tNOUN\t_\t_\t0\troot\t_\t_
"""


def word(number: int, head: int, form: str = "dog", relation: str = "dep") -> str:
    return f"{number}\t{form}\t_\tNOUN\t_\t_\t{head}\t{relation}\t_\t_\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "val.conllu"
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


def test_words_heads_and_places(tmp_path: Path) -> None:
    first, second = read_parses(write(tmp_path, FILE))
    assert (first.id, second.id) == ("17#0", "17#1")
    assert [(one.form, one.head, one.relation) for one in first.words][:3] == [
        ("A", 2, "det"),
        ("girl", 4, "nmod:poss"),
        ("'s", 2, "case"),
    ]
    assert first.tokens == ("A", "girl's", "dog", "doesn't", "bark", ",", "it", "sleeps")
    # "does" and "not" do not make up "doesn't": both stand where the token does.
    assert [CAPTION[start:stop] for start, stop in first.place(CAPTION)] == [
        "A", "girl", "'s", "dog", "doesn't", "doesn't", "bark", ",", "it", "sleeps",
    ]  # fmt: skip
    assert second.place("  Snow ") == ((2, 6),)


def test_line_ends_and_blanks_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "val.conllu"
    path.write_bytes(b"\xef\xbb\xbf" + FILE.replace("\n", "\r\n").encode() + b"\r\n\r\n")
    assert [parse.id for parse in read_parses(path)] == ["17#0", "17#1"]
    (parse,) = read_parses(write(tmp_path, "# sent_id = x\n" + word(1, 0, "10 000")))
    assert parse.place("10 000") == ((0, 6),)


def test_an_empty_file_has_no_sentence(tmp_path: Path) -> None:
    assert list(read_parses(write(tmp_path, "\n\n"))) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# sent_id = a\n1\tdog\t_\n", r"line 2: expected 10 fields between tabs.*found 3"),
        ("# sent_id = a\n" + word(1, 0).replace("\tNOUN\t", "\t\t"), "line 2: expected 10 fields"),
        ("# sent_id = a\n" + word(1, 0) + word(3, 1), "line 3: expected the number 2 of the next word; found '3'"),
        ("# sent_id = a\n" + word(1, 0).replace("\t0\t", "\t_\t"), "line 2: the word 'dog' needs the number of its"),
        ("# sent_id = a\n" + word(1, 0, relation="_"), "line 2: the word 'dog' needs"),
        ("# sent_id = a\n" + word(1, 2) + word(2, 1), "line 1: 2 words must have one root.*found 0 roots"),
        ("# sent_id = a\n" + word(1, 0) + word(2, 0), "found 2 roots"),
        ("# sent_id = a\n" + word(1, 0) + word(2, 9), "word 2 depends on word 9"),
        ("# sent_id = a\n" + word(1, 0) + word(2, 3) + word(3, 2), "heads of word 2 lead in a circle"),
        ("# sent_id = a\n" + word(1, 0) + word(1, 0).replace("1\t", "3-4\t", 1), "the token 3-4 must begin with"),
        ("# sent_id = a\n" + word(1, 0).replace("1\t", "1-2\t", 1) + word(1, 0), "a token ends with word 2"),
        (word(1, 0), r"line 1: expected one comment `# sent_id = ...`.*found none"),
        ("# sent_id = a\n# sent_id = b\n" + word(1, 0), "found 'a', 'b'"),
        ("\n# sent_id = a\n\n", "line 2: 0 words must have one root"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(read_parses(write(tmp_path, text)))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no annotation file"):
        list(read_parses(tmp_path / "val.conllu"))


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("A boy's dog doesn't bark , it sleeps", r"'17#0' does not match.*token 2 is \"girl's\", where.*\"boy's\""),
        ("A girl's dog doesn't", r"token 5 is 'bark', where the caption has 'ended'"),
        (f"{CAPTION} well", "the caption goes on with 'well'"),
    ],
)
def test_parses_of_other_words(tmp_path: Path, caption: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_parses(write(tmp_path, FILE), {"17#0": caption})


def test_captions_are_found_by_their_ids(tmp_path: Path) -> None:
    path = write(tmp_path, FILE)
    assert find_parses(path, {"17#1": "Snow"})["17#1"][1] == ((0, 4),)
    with pytest.raises(DataError, match=r"no parse of the caption '18#0' \(1 of 2 captions have none\): 'Rain'"):
        find_parses(path, {"17#1": "Snow", "18#0": "Rain"})
    with pytest.raises(DataError, match="line 4: a second parse of '17#1'"):
        find_parses(write(tmp_path, ("# sent_id = 17#1\n" + word(1, 0, "Snow") + "\n") * 2 + "\n"), {"17#1": "Snow"})
