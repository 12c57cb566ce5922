"""Collection by other processes while the learner learns: on this machine, or wherever Ray runs."""
