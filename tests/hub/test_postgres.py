# SPDX-License-Identifier: Apache-2.0
"""The hub on PostgreSQL: the main part of its tests again, with a database that several machines can share.

The whole of them: `HUB_TEST_POSTGRES=postgresql://USER@/?host=FOLDER scripts/test tests/hub`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from pysingularity.hub.accounts.people import add_user
from pysingularity.hub.accounts.rights import ALL_SCOPES, Principal
from pysingularity.hub.builds import queue
from pysingularity.hub.catalog import add_collection
from pysingularity.hub.context import Hub
from pysingularity.hub.models import Base, Build
from pysingularity.hub.settings import load_settings

from .conftest import make_data, started
from .test_contract import (  # noqa: F401
    hub,
    repository,
    server,
    test_builds_are_started_cancelled_and_repeated,
    test_builds_have_the_fields_and_states_of_the_contract,
    test_collections_are_made_listed_and_shown,
    test_health_and_metrics_are_for_machines,
    test_images_are_shown_frozen_compared_and_deleted,
    test_pages_of_the_contract_are_there,
    test_refusals_all_look_alike,
)
from .test_fuzz import test_no_name_breaks_a_door  # noqa: F401
from .test_library import test_every_way_of_uploading_gives_the_image, test_search_and_delete  # noqa: F401
from .test_oci import test_pushed_image_is_an_image_at_every_door, test_referrers_name_what_speaks_of_an_image  # noqa: F401
from .test_shub import test_answer_has_what_every_generation_of_clients_reads  # noqa: F401
from .world import Server

pytestmark = pytest.mark.postgres


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory, postgres_server: str) -> Iterator[tuple[Server, Hub]]:
    """A running hub on PostgreSQL."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HUB_TEST_POSTGRES", postgres_server)
        data = make_data(tmp_path_factory.mktemp("postgres"))
    one = started(data)
    opened = Hub(load_settings(data))
    assert not opened.database.sqlite
    yield one, opened
    opened.close()
    one.stop()


def test_migrations_and_models_are_one_schema_on_both_databases(postgres: str, tmp_path: Path):
    for url in (f"sqlite:///{tmp_path / 'x.sqlite'}", postgres.replace("postgresql://", "postgresql+psycopg://")):
        from pysingularity.hub.database import Database

        database = Database(url)
        database.migrate()
        with database.engine.connect() as connection:
            # Alembic cannot compare an index in descending order, as the queue has one.
            options = {"include_object": lambda _thing, name, *_: name != "ix_builds_queue"}
            assert compare_metadata(MigrationContext.configure(connection, opts=options), Base.metadata) == []
        database.close()


def test_many_workers_claim_every_build_once(clean: tuple[Server, Hub]):
    one_hub = clean[1]
    with one_hub.write() as session:
        user = add_user(session, "claimer")
        who = Principal(user, ALL_SCOPES)
        for number in range(20):
            one = add_collection(session, who, f"claimer/c{number}")
            # another worker's robots must not take them: this hub has none that knows the recipe
            session.add(Build(collection_id=one.id, commit="a" * 40, recipe="Singularity", tag="t", queue_owner="x"))
    found: list[int] = []

    def work(name: str) -> None:
        while True:
            with one_hub.write() as session:
                number = queue.claim(session, worker=name, lease=600, active_per_collection=1)
            if number is None:
                return
            found.append(number)

    threads = [threading.Thread(target=work, args=(f"w{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with one_hub.read() as session:
        rows = session.execute(sa.select(Build.worker, Build.state).where(Build.queue_owner == "x")).all()
    assert len(found) == len(set(found))
    assert len(rows) == 20
    assert all(state != "queued" for _, state in rows)
