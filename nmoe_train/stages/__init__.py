"""The three training stages of the paper (arXiv 2511.01743), and what they share.

extractor    stage 1: the shared feature extractor F, by FedCE or FedSC
experts      stage 2: a personal expert Hᵢ per client
gate         stage 3: the gate G, by RanGate, RollGate or FedGate
losses       the formulae as pure functions of tensors
federation   one federated round: scheduling, FedAvg, the record of the round
privacy      the privacy budget ε of FedSC's noisy matrices

trainer.py runs the stages one after another. Nothing here reads or writes files.
"""
