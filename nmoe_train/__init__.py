"""Federated training of a networked mixture of experts, and the run that it leaves behind."""
