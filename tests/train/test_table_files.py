import pytest

from minitf.train.table_files import Dialect, not_a_name, not_a_number, table_documents


def written(folder, name, content):
    file = folder / name
    file.write_text(content)
    return file


TABLE = 'time,name,temperature,pressure\n1,a,3.5,10\n2,"b, c",-1e2,20\n\n3,a,0.25,30\n'


def test_columns_are_read_by_name_as_texts_symbols_or_numbers(tmp_path):
    files = [written(tmp_path, "x.csv", TABLE)]
    read = lambda columns, check, series: list(table_documents(files, columns, Dialect(), check, series=series))
    assert read(["name"], None, False) == ["a\n", "b, c\n", "a\n"]
    assert read(["name", "time"], None, False) == ["a\t1\n", "b, c\t2\n", "a\t3\n"]
    assert "".join(read(["time", "name"], not_a_name, True)) == "1\na\n2\nb, c\n3\na\n"
    assert "".join(read(["temperature", "time"], not_a_number, True)) == "3.5,1\n-1e2,2\n0.25,3\n"


def test_other_delimiters_and_single_columns_are_read(tmp_path):
    tabs = written(tmp_path, "x.tsv", TABLE.replace(",", "\t"))
    semicolons = written(tmp_path, "y.csv", "a;b\n1;2\n")
    single = written(tmp_path, "z.csv", "\ufeffonly\nx\n")
    assert next(table_documents([tabs], ["pressure"], Dialect(), None, series=False)) == "10\n"
    assert list(table_documents([semicolons], ["b"], Dialect(";"), None, series=False)) == ["2\n"]
    assert list(table_documents([single], [], Dialect(), None, series=False)) == ["x\n"]


@pytest.mark.parametrize(
    ("content", "columns", "check", "message"),
    [
        (TABLE, ["nane"], None, "has no column 'nane'. Its columns are 'time', 'name'"),
        (TABLE, [], None, "has several columns: say which"),
        (TABLE, ["name"], not_a_number, "line 2: the name 'a' is not a finite number"),
        ("a,b\n1,2\n3\n", ["b"], None, "line 3: there are only 1 cells"),
        ("a,b\n1,nan\n", ["b"], not_a_number, "line 2: the b 'nan' is not a finite number"),
        ("a,b\n1,\n", ["b"], not_a_name, "line 2: the b '' is empty"),
        ("a,b,b\n1,2,3\n", ["b"], None, "has several columns 'b'"),
        ('a,b\n1,"x" y\n', ["b"], None, "line 2: this is not a table .*data.quotes=false"),
        ('a,b\n1,"x\n2,y\n', ["b"], None, "line 3: this is not a table .*ends with one"),
        ('a,"b\n1,2\n', ["b"], None, "line 2: this is not a table"),
    ],
)
def test_what_is_no_table_is_named_with_its_line(tmp_path, content, columns, check, message):
    file = written(tmp_path, "x.csv", content)
    with pytest.raises(ValueError, match=f"x\\.csv.* {message}"):
        list(table_documents([file], columns, Dialect(), check, series=False))


def test_a_cell_may_be_a_whole_text(tmp_path):
    file = written(tmp_path, "x.csv", "a,b\n1," + "x" * 200_000)
    assert list(table_documents([file], ["b"], Dialect(), None, series=False)) == ["x" * 200_000 + "\n"]


def test_quotes_may_be_part_of_what_is_written(tmp_path):
    file = written(tmp_path, "x.tsv", 'a\tb\n1\t"begins\n2\tends"\n3\t"both"\n')
    found = table_documents([file], ["b"], Dialect(quotes=False), None, series=False)
    assert list(found) == ['"begins\n', 'ends"\n', '"both"\n']
