"""Real robots as tasks: ``robot:<file.yaml>`` makes a `TaskEnv` of anything with LeRobot's `Robot` interface."""
