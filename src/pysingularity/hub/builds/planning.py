# SPDX-License-Identifier: Apache-2.0
"""From a change in a repository to rows in the queue: which recipes to build, and which not, with the reason.

Planning is repeatable: the same change planned twice gives no second build, so a forge that repeats itself, an attacker
who replays a request and a robot that died half-way do no harm.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pysingularity.hub.builds.log import LogWriter, log_path, stamp
from pysingularity.hub.builds.queue import enqueue, supersede
from pysingularity.hub.builds.states import ACTIVE, QUEUED
from pysingularity.hub.context import Hub
from pysingularity.hub.errors import Conflict, Invalid, NotFound, TooMany
from pysingularity.hub.models import Branch, Build, Collection, Recipe, now
from pysingularity.hub.sources.discovery import Found, concerned, recipes_of
from pysingularity.hub.sources.git import GitError, Mirror, check_url

DAY = 86400


@dataclass
class Plan:
    """What planning decided: numbers of new builds, and sentences on what was left out."""

    builds: list[int] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def mirror_of(hub: Hub, collection: Collection) -> Mirror:
    """Return the mirror of a collection's repository."""
    if not collection.git_url:
        raise Conflict("no-repository", f"{collection.full_name}: no git repository is connected")
    approved = collection.approved_url == collection.git_url
    url = check_url(collection.git_url, hub.settings.sources, approved=approved)
    return Mirror(hub.settings.folder("git") / f"{collection.id}.git", url, hub.settings.sources, approved=approved)


def enabled_branches(collection: Collection, present: dict[str, str], default: str) -> list[str]:
    """Return the branches that build: those that match the collection's patterns, or the repository's default one."""
    patterns = [str(pattern) for pattern in collection.branches]
    if not patterns:
        return [default] if default in present else []
    return [name for name in sorted(present) if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def look(hub: Hub, collection_id: int, *, trigger: str = "push", delivery_id: int | None = None, by: str = "") -> Plan:
    """Fetch a collection's repository, and queue what changed on its branches since they were last looked at.

    A branch that was never seen is scanned whole. Runs git outside of any transaction.

    Raises:
        HubError: the repository cannot be reached or is refused.
    """
    with hub.read() as session:
        collection = session.get(Collection, collection_id)
        if collection is None:
            raise NotFound("no-such-collection", f"collection {collection_id}: there is no such collection")
        seen = {
            row.name: row.head
            for row in session.scalars(sa.select(Branch).where(Branch.collection_id == collection_id))
        }
    mirror = mirror_of(hub, collection)
    mirror.fetch()
    present, default = mirror.branches(), mirror.default_branch()
    plan = Plan()
    wanted = enabled_branches(collection, present, default)
    if not wanted:
        plan.remarks.append("no branch of the repository is enabled" if present else "the repository is empty")
    changes: list[tuple[str, str, list[Found], list[Found]]] = []
    for branch in wanted:
        head, before = present[branch], seen.get(branch, "")
        if head == before:
            continue
        recipes = recipes_of(mirror, head, limit=hub.settings.sources.recipe_limit)
        changed = mirror.changed(before, head) if before else {entry.path for entry in mirror.entries(head)}
        todo = concerned(recipes, changed)
        todo += [one for one in recipes if one.problem and one.path in changed]
        changes.append((branch, head, recipes, todo))
        if not recipes:
            plan.remarks.append(f"{branch}: no file named Singularity or Singularity.TAG")
        elif not todo:
            plan.remarks.append(f"{branch}: no recipe changed")
    with hub.write() as session:
        collection = session.get_one(Collection, collection_id)
        collection.default_branch, collection.changed_at = default, now()
        for name in set(seen) - set(present):
            session.execute(sa.delete(Branch).where(Branch.collection_id == collection_id, Branch.name == name))
            session.execute(sa.delete(Recipe).where(Recipe.collection_id == collection_id, Recipe.branch == name))
        for branch, head, recipes, todo in changes:
            waits = trigger == "push" and "push" not in collection.triggers
            # Who builds later builds everything that changed until then.
            _remember(session, collection, branch, head if collection.building and not waits else "", recipes)
            if not collection.building:
                plan.remarks.append(f"{branch}: building is switched off")
                continue
            if waits:
                plan.remarks.append(f"{branch}: pushes do not build in this collection")
                continue
            for number, one in enumerate(todo):
                if number >= hub.settings.builds.recipes_per_push:
                    plan.remarks.append(
                        f"{branch}: {len(todo) - number} recipes were left out, a push builds no more than {number}"
                    )
                    break
                build = add_build(
                    hub, session, collection, one, branch=branch, commit=head, trigger=trigger, by=by,
                    delivery_id=delivery_id, plan=plan,
                )  # fmt: skip
                if build is not None:
                    plan.builds.append(build.id)
    return plan


def moved(hub: Hub, collection_id: int) -> bool:
    """Ask a repository, without fetching anything, whether its branches are not what was last looked at.

    Raises:
        HubError: the repository cannot be reached or is refused.
    """
    with hub.read() as session:
        collection = session.get(Collection, collection_id)
        if collection is None:
            return False
        rows = session.scalars(sa.select(Branch).where(Branch.collection_id == collection_id))
        seen = {row.name: row.head for row in rows}
    mirror = mirror_of(hub, collection)
    if not (mirror.path / "HEAD").exists():
        return True
    present = mirror.remote_branches()
    wanted = enabled_branches(collection, present, mirror.default_branch())
    return {name: present[name] for name in wanted} != {name: seen.get(name, "") for name in wanted} or (
        bool(set(seen) - set(present))
    )


def _remember(session: Session, collection: Collection, branch: str, head: str, recipes: list[Found]) -> None:
    """Note the recipes at the head of a branch, and the head itself unless it is empty (looked at, not built)."""
    row = session.scalar(sa.select(Branch).where(Branch.collection_id == collection.id, Branch.name == branch))
    if head and row is None:
        session.add(Branch(collection_id=collection.id, name=branch, head=head))
    elif head and row is not None:
        row.head, row.seen_at = head, now()
    here = Recipe.collection_id == collection.id, Recipe.branch == branch
    known = {
        (path, base): digest
        for path, base, digest in session.execute(sa.select(Recipe.path, Recipe.base, Recipe.base_digest).where(*here))
    }
    session.execute(sa.delete(Recipe).where(Recipe.collection_id == collection.id, Recipe.branch == branch))
    session.add_all(
        Recipe(
            collection_id=collection.id,
            branch=branch,
            path=one.path,
            tag=one.tag,
            commit=one.commit,
            changed_at=one.changed_at,
            shadowed=one.shadowed,
            copies=one.copies,
            base=one.base,
            base_digest=known.get((one.path, one.base), ""),
            problem=one.problem,
        )
        for one in {one.path: one for one in recipes}.values()
    )


def add_build(
    hub: Hub,
    session: Session,
    collection: Collection,
    recipe: Found,
    *,
    branch: str,
    commit: str,
    trigger: str,
    by: str,
    plan: Plan,
    delivery_id: int | None = None,
    publish: bool = True,
    arch: str = "",
    repeat: bool = False,
) -> Build | None:
    """Queue one build with the first lines of its log; None (and a remark) when it is not wanted.

    Arguments:
        repeat: also when there was a build of this commit for the same reason.

    A recipe that cannot be built gets a build that has failed, with the reason, so that the person sees it where all
    other results are.
    """
    if trigger != "manual" and not repeat:
        known = session.scalar(
            sa.select(Build.id).where(
                Build.collection_id == collection.id,
                Build.commit == commit,
                Build.recipe == recipe.path,
                Build.branch == branch,
                Build.trigger == trigger,
                Build.publish.is_(publish),
            )
        )
        if known is not None:
            plan.remarks.append(f"{branch}: build {known} is already for {recipe.path} of {commit[:12]}")
            return None
    try:
        _within_limits(hub, session, collection)
    except TooMany as error:
        plan.remarks.append(f"{recipe.path}: {error.message}")
        return None
    build = Build(
        collection_id=collection.id,
        trigger=trigger,
        requested_by=by,
        branch=branch,
        commit=commit,
        recipe=recipe.path,
        tag=recipe.tag,
        arch=arch,
        publish=publish,
        delivery_id=delivery_id,
        priority=10 if trigger == "manual" else 0,
    )
    enqueue(session, build, collection.owner)
    if recipe.problem:
        build.state, build.error_id, build.reason = "failed", "bad-recipe", recipe.problem
        build.finished_at = now()
    announce(hub, build, collection)
    if build.state == QUEUED and trigger != "manual":
        for number in supersede(session, collection, tag=build.tag, branch=branch, arch=arch, by=build):
            plan.remarks.append(f"build {number} was superseded by build {build.id}")
    return build


def announce(hub: Hub, build: Build, collection: Collection) -> None:
    """Write the first lines of a build's log, so that there is something to see from the first moment on."""
    with LogWriter(log_path(hub.settings.folder("logs"), build.id), limit=hub.settings.builds.log_limit) as log:
        what = f"{build.recipe} of {build.commit[:12]} ({build.trigger})"
        log.line(f"Build {build.id} of {collection.title}:{build.tag}, {what}")
        if build.state == QUEUED:
            log.line(f"Queued at {stamp()} UTC, waiting for a worker")
        else:
            log.line(f"This recipe cannot be built: {build.reason}")


def _within_limits(hub: Hub, session: Session, collection: Collection) -> None:
    waiting = session.scalar(
        sa.select(sa.func.count()).where(Build.collection_id == collection.id, Build.state == QUEUED)
    )
    most = hub.settings.builds.queued_per_collection
    if (waiting or 0) >= most:
        raise TooMany("queue-full", f"no more than {most} builds of a collection wait at a time", seconds=60)
    daily = hub.settings.limits.builds_per_day
    if daily:
        today = session.scalar(
            sa.select(sa.func.count()).where(Build.collection_id == collection.id, Build.created_at > now() - DAY)
        )
        if (today or 0) >= daily:
            raise TooMany("builds-per-day", f"no more than {daily} builds of a collection per day", seconds=3600)


def manual(
    hub: Hub, collection_id: int, *, recipe: str = "", tag: str = "", ref: str = "", by: str, publish: bool = True
) -> Build:
    """Queue a build that somebody asked for: any recipe of any commit.

    Arguments:
        recipe: path in the repository, or empty for the one of `tag` (default `latest`, or the only one there is).
        ref: branch, tag or commit; empty for the default branch.

    Raises:
        NotFound: there is no such commit or recipe.
        Conflict: several recipes and none was named.
        TooMany: the queue is full.
    """
    with hub.read() as session:
        collection = session.get_one(Collection, collection_id)
    mirror = mirror_of(hub, collection)
    try:
        mirror.fetch()
    except GitError:
        if not (mirror.path / "HEAD").exists():
            raise
        # The repository is away, but a commit that is here can be built all the same.
    present = mirror.branches()
    branch = ref if ref in present else ""
    if not ref:
        branch = next(iter(enabled_branches(collection, present, mirror.default_branch())), "")
        if not branch:
            raise NotFound("empty-repository", f"{collection.full_name}: the repository is empty")
    commit = mirror.resolve(ref or branch)
    found = recipes_of(mirror, commit, limit=hub.settings.sources.recipe_limit)
    chosen = _choose(found, recipe, tag)
    if chosen.problem:
        raise Invalid("bad-recipe", f"{chosen.path}: {chosen.problem}")
    plan = Plan()
    with hub.write() as session:
        collection = session.get_one(Collection, collection_id)
        if not collection.building:
            raise Conflict("building-off", f"{collection.full_name}: building is switched off")
        _within_limits(hub, session, collection)
        build = add_build(
            hub, session, collection, chosen, branch=branch, commit=commit, trigger="manual", by=by, plan=plan,
            publish=publish,
        )  # fmt: skip
        assert build is not None
    return build


def _choose(found: list[Found], recipe: str, tag: str) -> Found:
    if recipe:
        for one in found:
            if one.path == recipe.removeprefix("/"):
                return one
        raise NotFound("no-such-recipe", f"{recipe[:200]}: the commit has no such recipe")
    fresh = [one for one in found if not one.shadowed]
    for one in fresh:
        if one.tag == (tag or "latest"):
            return one
    if tag or not fresh:
        raise NotFound("no-such-recipe", f"the commit has no recipe for the tag {tag or 'latest'}")
    if len(fresh) > 1:
        names = ", ".join(sorted(one.path for one in fresh)[:20])
        raise Conflict("which-recipe", f"the commit has several recipes: {names}", hint='name one as "recipe"')
    return fresh[0]


def busy(session: Session) -> int:
    """Return how many builds are active."""
    return session.scalar(sa.select(sa.func.count()).where(Build.state.in_(ACTIVE))) or 0
