"""Tells Gymnasium of the environment."""

ENVIRONMENT_ID = "L2A-Selection-v0"


def register_environment() -> None:
    """Register ``L2A-Selection-v0``, once."""
    from gymnasium.envs.registration import register, registry

    if ENVIRONMENT_ID not in registry:
        register(ENVIRONMENT_ID, entry_point="l2a.selector.environment:SelectionEnvironment")
