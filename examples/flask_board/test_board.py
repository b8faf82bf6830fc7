"""The board's own tests, as an application writes them: no server, no worker, nothing to wait for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from board import create_app
from flask.testing import FlaskClient

from broadcastable.testing import Recording, assert_broadcasts, assert_no_broadcasts, capture_broadcasts


@pytest.fixture
def client(tmp_path: Path, broadcasts: Recording) -> Iterator[FlaskClient]:
    """A client of the board; what it broadcasts is recorded, and nothing is sent."""
    with create_app(f"sqlite:///{tmp_path / 'board.db'}").test_client() as client:
        yield client


def test_a_new_card_is_broadcast(client: FlaskClient) -> None:
    with assert_broadcasts(
        "board", count=1, operation="insert", value={"title": "Water the plants", "column": "to do"}
    ):
        assert client.post("/cards", json={"title": "Water the plants"}).status_code == 201


def test_the_answer_names_the_transaction_that_the_page_will_see(client: FlaskClient) -> None:
    with capture_broadcasts("board") as seen:
        answer = client.post("/cards", json={"title": "Water the plants"}).get_json()

    assert [(each.key, each.txid) for each in seen] == [(str(answer["id"]), answer["txid"])]


def test_a_card_that_is_refused_is_not_broadcast(client: FlaskClient) -> None:
    with assert_no_broadcasts():
        assert client.post("/cards", json={"title": ""}).status_code == 400
        assert client.patch("/cards/7", json={"column": "done"}).status_code == 404


@pytest.mark.parametrize("body", ["[]", '["title"]', "5", "null", "{", '{"title": ["a"]}', '{"title": "\\ud800"}'])
def test_a_body_that_says_no_title_is_refused(client: FlaskClient, body: str) -> None:
    """Whatever JSON a visitor sends, the answer is that it is not understood, and nothing is stored."""
    card = client.post("/cards", json={"title": "Water the plants"}).get_json()["id"]
    with assert_no_broadcasts():
        assert client.post("/cards", data=body, content_type="application/json").status_code == 400
        assert client.patch(f"/cards/{card}", data=body, content_type="application/json").status_code == 400


@pytest.mark.parametrize("column", ["later", ["done"], None])
def test_a_column_that_there_is_not_is_refused(client: FlaskClient, column: object) -> None:
    card = client.post("/cards", json={"title": "Water the plants"}).get_json()["id"]
    with assert_no_broadcasts():
        assert client.patch(f"/cards/{card}", json={"column": column}).status_code == 400


def test_a_number_that_no_card_can_have_is_not_found(client: FlaskClient) -> None:
    assert client.patch(f"/cards/{10**20}", json={"column": "done"}).status_code == 404
    assert client.delete(f"/cards/{10**20}").status_code == 404


def test_what_is_done_goes_in_one_transaction(client: FlaskClient) -> None:
    for title in ("one", "two", "three"):
        card = client.post("/cards", json={"title": title}).get_json()["id"]
        if title != "two":
            client.patch(f"/cards/{card}", json={"column": "done"})

    with capture_broadcasts("board") as seen:
        client.post("/cards/done/clear")

    assert {(each.operation, each.key) for each in seen} == {("delete", "1"), ("delete", "3")}
    assert len({each.txid for each in seen}) == 1


def test_clearing_nothing_still_tells_the_page_that_it_is_done(client: FlaskClient) -> None:
    with capture_broadcasts("board") as seen:
        txid = client.post("/cards/done/clear").get_json()["txid"]

    assert [(each.type, each.txid) for each in seen] == [("$tx", txid)]
