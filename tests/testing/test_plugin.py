"""The pytest plugin and the unittest mixin, in suites of their own."""

from __future__ import annotations

import subprocess
import sys
import unittest

import pytest

from broadcastable.errors import UsageError
from broadcastable.testing import BroadcastTestCase


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

        def test_bool(broadcasts):
            assert assert_broadcasts("rooms")
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
            '>       assert assert_broadcasts("rooms")',
            "E       broadcastable.errors.UsageError: assert_broadcasts(...) is neither true nor false*",
        ]
    )
    result.stdout.no_fnmatch_line("*asserting.py:*in check_since*")


def test_an_assertion_that_nobody_has_checked_fails_its_test(suite: pytest.Pytester) -> None:
    """Whatever the warning filters say, and wherever the object is kept."""
    suite.makeini("[pytest]\naddopts = -p no:cacheprovider\nfilterwarnings = ignore\n")
    suite.makepyfile(
        """
        import asyncio
        import unittest
        import pytest
        from broadcastable.testing import BroadcastTestCase, assert_broadcasts, assert_no_broadcasts

        kept = []

        def nothing_happens():
            return assert_no_broadcasts("rooms")

        def test_from_a_helper(broadcasts):
            nothing_happens()

        def test_named(broadcasts):
            (check := assert_broadcasts("rooms"))

        def test_kept(broadcasts):
            kept.append(assert_broadcasts("rooms"))

        @pytest.mark.anyio
        async def test_async(broadcasts):
            nothing_happens()

        class Test(BroadcastTestCase, unittest.TestCase):
            def test_in_a_case(self):
                check = self.assert_broadcasts("rooms")

        def test_that_fails_anyway(broadcasts):
            check = assert_broadcasts("rooms")
            1 / 0

        def test_entered_later(broadcasts):
            check = nothing_happens()
            with check:
                pass

        def test_none_is_blamed_for_another(broadcasts):
            kept.clear()
        """
    )
    suite.makeconftest("import pytest\n@pytest.fixture\ndef anyio_backend(): return 'asyncio'\n")
    result = suite.runpytest_subprocess("-p", "anyio")
    result.assert_outcomes(failed=6, passed=2)
    result.stdout.fnmatch_lines(
        [
            "assert_no_broadcasts(...) at *.py:9 was neither entered nor a statement of its own: nothing was checked",
            "E*ZeroDivisionError*",
        ]
    )


def test_an_assertion_is_kept_in_mind_by_the_test_that_first_imports_the_kit(suite: pytest.Pytester) -> None:
    suite.makeini("[pytest]\naddopts = -p no:cacheprovider\nfilterwarnings = ignore\n")
    suite.makepyfile(
        """
        def test_it():
            from broadcastable.testing import assert_broadcasts
            check = assert_broadcasts("rooms")
        """
    )
    result = suite.runpytest_subprocess()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["assert_broadcasts(...) at *.py:3 was neither entered nor *"])


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


def test_a_set_up_without_super_is_isolated_too(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        test_rooms="""
        import unittest
        from broadcastable import current
        from broadcastable.testing import BroadcastTestCase

        class RoomTest(BroadcastTestCase, unittest.TestCase):
            def setUp(self):
                current().broadcast_to("rooms", name="set up")
                self.addCleanup(self.look)

            def look(self):
                self.assert_broadcasts("rooms", count=3)

            def tearDown(self):
                current().broadcast_later_to("rooms", name="tear down")

            def test_recorded(self):
                current().broadcast_to("rooms", name="a")
                self.assert_broadcasts("rooms", count=2)

        RoomTest("test_recorded").debug()
        """
    )
    unittest_run = [sys.executable, "-W", "error", "-m", "unittest", "test_rooms"]
    result = subprocess.run(unittest_run, capture_output=True, text=True, check=False)
    assert "Ran 1 test" in result.stderr
    assert "\nOK" in result.stderr
    suite.runpytest_subprocess().assert_outcomes(passed=1)


@pytest.mark.parametrize("case", [unittest.TestCase, unittest.IsolatedAsyncioTestCase])
def test_a_mixin_that_comes_too_late_is_refused(case: type[unittest.TestCase]) -> None:
    with pytest.raises(UsageError, match=r"class Late\(BroadcastTestCase, unittest\.TestCase\)"):
        type("Late", (case, BroadcastTestCase), {})
    base = type("Base", (case,), {})
    with pytest.raises(UsageError, match="comes before TestCase"):
        type("Late", (base, BroadcastTestCase), {})
    early = type("Early", (BroadcastTestCase, base), {})
    assert type("Further", (early,), {})


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
