from __future__ import annotations

import json

from fxfusion.cli.profiles import PROFILES, Profile
from fxfusion.planning.roads import check_roads


def test_each_profile_has_its_settings_and_takes_more_than_the_one_before() -> None:
    assert list(PROFILES) == list(Profile) == [Profile.quick, Profile.balanced, Profile.thorough]
    sizes = [settings.sequences for settings in PROFILES.values()]
    rounds = [settings.rounds for settings in PROFILES.values()]
    assert sizes == sorted(set(sizes)) and rounds == sorted(set(rounds))
    for settings in PROFILES.values():
        assert json.loads(json.dumps(settings.to_dict())) == settings.to_dict()
        assert settings.sequences // settings.batch >= 8, (
            "one batch in eight is held out, and a refit wants its own eighth"
        )
        assert settings.roads is None or check_roads(settings.roads) == settings.roads
