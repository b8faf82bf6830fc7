"""The pytest plugin and the unittest mixin, in suites of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeini("[pytest]\naddopts = -p no:cacheprovider\nfilterwarnings = error\n")
    return pytester


def test_the_fixtures_are_there_without_a_conftest(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        """
        from broadcastable import current

        def test_recorded(broadcasts, drain, memory_streams):
            current().broadcast_later_to("rooms", name="a")
            assert len(broadcasts) == 1
            drain()
            assert memory_streams.events("rooms") == [{"name": "a"}]

        def test_nothing_is_left_of_the_test_before(broadcasts, memory_streams):
            assert len(broadcasts) == 0
            assert memory_streams.names() == []

        def test_isolated(durable_streams):
            assert current() is durable_streams

        def test_server(stream_server):
            assert stream_server.url == stream_server.settings.server_url
        """
    )
    suite.runpytest_subprocess().assert_outcomes(passed=4)


def test_settings_come_from_a_fixture_that_a_conftest_overrides(suite: pytest.Pytester) -> None:
    suite.makeconftest(
        """
        import pytest

        @pytest.fixture
        def durable_streams_settings():
            return {"gid_app": "chat", "client_url": "https://streams.example"}
        """
    )
    suite.makepyfile(
        """
        def test_it(durable_streams):
            assert durable_streams.settings.gid_app == "chat"
            assert durable_streams.signed_stream_url("rooms").startswith("https://streams.example/rooms?token=")
        """
    )
    suite.runpytest_subprocess().assert_outcomes(passed=1)


def test_a_failure_fails_the_test_and_shows_its_line(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        """
        from broadcastable import current
        from broadcastable.testing import assert_broadcasts

        def test_block(broadcasts):
            with assert_broadcasts("rooms", count=1):
                current().broadcast_to("room", name="a")

        def test_statement(broadcasts):
            assert_broadcasts("rooms")

        def test_never_entered(broadcasts):
            check = assert_broadcasts("rooms")
        """
    )
    result = suite.runpytest_subprocess()
    result.assert_outcomes(failed=3)
    result.stdout.fnmatch_lines(
        [
            '>       with assert_broadcasts("rooms", count=1):',
            "E       AssertionError: Expected exactly 1 broadcast on rooms, but there was none.",
            "E       Elsewhere, the nearest first:",
            "E         1 broadcast on room",
            '>       assert_broadcasts("rooms")',
            "E       AssertionError: Expected at least 1 broadcast on rooms, but there was none.",
            "E       Nothing was broadcast on any other stream.",
            "*RuntimeWarning: assert_broadcasts(...) was neither entered nor a statement of its own*",
        ]
    )
    result.stdout.no_fnmatch_line("*asserting.py:*in check_since*")


def test_every_xdist_process_records_its_own(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        """
        import pytest
        from broadcastable import current
        from broadcastable.testing import assert_broadcasts

        @pytest.mark.parametrize("n", range(8))
        def test_it(n, broadcasts):
            for _ in range(n):
                current().broadcast_later_to("rooms", n=n)
            assert_broadcasts("rooms", count=n, value=None)
            assert [each.payload for each in broadcasts] == [{"n": n}] * n
        """
    )
    suite.runpytest_subprocess("-n", "2").assert_outcomes(passed=8)


def test_a_suite_of_unittest_has_a_mixin(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        test_rooms="""
        import unittest
        from broadcastable import aio, current
        from broadcastable.testing import BroadcastTestCase

        class RoomTest(BroadcastTestCase, unittest.TestCase):
            def test_recorded(self):
                with self.assert_broadcasts("rooms", count=1), self.assert_no_broadcasts("notices"):
                    current().broadcast_later_to("rooms", name="a")
                self.assert_broadcasts("rooms", count=1)
                self.assertEqual(len(self.broadcasts), 1)
                self.assertEqual([each.payload for each in self.capture_broadcasts("rooms")], [{"name": "a"}])
                self.assertIs(self.durable_streams, current())
                self.drain()
                self.assertEqual(self.memory_streams.events("rooms"), [{"name": "a"}])

            def test_failing(self):
                self.assert_broadcasts("rooms")

        class AsyncRoomTest(BroadcastTestCase, unittest.IsolatedAsyncioTestCase):
            async def test_recorded(self):
                async with self.assert_broadcasts("rooms", count=1):
                    await aio.broadcast_to("rooms", name="a")
                await aio.close()

            async def test_nothing_is_left(self):
                self.assert_no_broadcasts()
        """
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "unittest", "test_rooms"], capture_output=True, text=True, check=False
    )
    assert "Ran 4 tests" in result.stderr
    assert "FAILED (failures=1)" in result.stderr
    assert "AssertionError: Expected at least 1 broadcast on rooms, but there was none." in result.stderr


def test_pytest_does_not_load_the_package_before_a_fixture_is_asked_for(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        """
        import sys

        def test_it():
            assert "pytest_broadcastable" in sys.modules
            assert not {"broadcastable", "sqlalchemy", "httpx", "dramatiq"} & set(sys.modules)
        """
    )
    suite.runpytest_subprocess().assert_outcomes(passed=1)
