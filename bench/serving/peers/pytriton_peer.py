"""PyTriton: Triton's own server before a Python worker with ONNX Runtime, dynamic batching of 64. Arguments: model folder, gRPC port, HTTP port."""

# requires: nvidia-pytriton==0.7.0 onnxruntime

from __future__ import annotations

import sys

import numpy as np
import onnxruntime as ort
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

folder, grpc_port, http_port = sys.argv[1:4]
options = ort.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = ort.InferenceSession(f"{folder}/model.onnx", options, ["CPUExecutionProvider"])
columns_in, columns_out = session.get_inputs()[0].shape[1], session.get_outputs()[0].shape[1]


@batch
def infer(x):
    """y from x."""
    return session.run(["y"], {"x": x})


config = TritonConfig(
    http_address="127.0.0.1", grpc_address="127.0.0.1", http_port=int(http_port), grpc_port=int(grpc_port),
    allow_metrics=False,
)  # fmt: skip
with Triton(config=config) as triton:
    triton.bind(
        model_name="bench",
        infer_func=infer,
        inputs=[Tensor(name="x", dtype=np.float32, shape=(columns_in,))],
        outputs=[Tensor(name="y", dtype=np.float32, shape=(columns_out,))],
        config=ModelConfig(max_batch_size=64, batcher=DynamicBatcher(max_queue_delay_microseconds=0)),
    )
    triton.serve()
