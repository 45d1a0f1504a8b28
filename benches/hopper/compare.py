#!/usr/bin/env python3
"""The Hopper kernels beside their peers: one process, one card, taking turns.

Launches the kernels of `kernels/` as `kernels/README.md` describes, compiled by nvcc, on tensors that PyTorch makes, so that the peers that have only
a Python interface can be timed in the same rounds. Needs Linux, nvcc, PyTorch with CUDA; and for the peers the packages fa3-fwd 0.0.3 and
nvidia-cudnn-frontend 1.32.0 (a peer that is missing is left out and named).

    python3 benches/hopper/compare.py                    the tables of docs/results
    python3 benches/hopper/compare.py 4x32x4096x128 ..   these shapes: BATCHxHEADSxLENGTHxHEAD_DIM, with :causal
    python3 benches/hopper/compare.py stages             whether kernels with 1, 2, 4 and 8 stages give the same bits

For each shape every kernel is timed in each of five rounds by CUDA events around single calls, 90 ms a round, and 150 ms beyond 2048 tokens, where the card is at its power
cap and its clock takes a while to settle; each round takes the kernels in another order, since one that follows a hot one reads slower. The figure is the median of the rounds' medians. Up to 2048 tokens a call is replayed from a CUDA graph, which takes the launch cost out for all alike.
TOPS = 4 B H N N D / time, halved when causal. "alone" starts from what the preparation wrote, "whole" from 16-bit tensors; both end with 16-bit O. "half" is the
recipe without quantization, one launch: its peers are the 16-bit ones, type against type, as multipliers of bf16 draw less power.
FP8 peers are given FP8 tensors.
"""
import concurrent.futures
import ctypes
import pathlib
import random
import statistics
import struct
import subprocess
import sys
import tempfile

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = pathlib.Path(__file__).resolve().parents[2]
ROUNDS, GRAPHS_UP_TO = 5, 2048
BUDGET_MS, BUDGET_BEYOND_MS = 90, 150  # of a round, up to GRAPHS_UP_TO tokens and beyond
# Beyond these lengths no plan takes the running maximum, and `half` is far behind.
RUNNING_UP_TO, HALF_UP_TO = 1024, 8192
LENGTHS = {128: (512, 1024, 2048, 4096, 8192, 16384, 32768), 64: (1024, 2048, 4096, 16384, 32768), 256: (4096, 16384)}
FULL = [f"4x32x{n}x{d}" for d, lengths in LENGTHS.items() for n in lengths] + ["12x64x197x64", "4x24x1105x64"]
CAUSAL = [f"4x32x{n}x128:causal" for n in (1024, 1536, 2048, 4096, 8192, 16384, 32768)] + [f"4x32x{n}x64:causal" for n in (1024, 4096, 16384, 32768)]
CAUSAL += ["4x32x16384x256:causal"]

cuda = ctypes.CDLL("libcuda.so.1")
torch.zeros(1, device="cuda")
MULTIPROCESSORS = torch.cuda.get_device_properties(0).multi_processor_count


class Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_uint * 16)]


class Config(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")]
    _fields_ += [("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(Attribute)), ("count", ctypes.c_uint)]


SHARED_MEMORY = 232448  # bytes of a block
CLUSTER_DIMENSION, PROGRAMMATIC_SERIALIZATION = 4, 6  # CUlaunchAttributeID
MAX_DYNAMIC_SHARED, NON_PORTABLE_CLUSTER = 8, 14  # CUfunction_attribute


def check(result, what):
    if result:
        text = ctypes.c_char_p()
        cuda.cuGetErrorString(result, ctypes.byref(text))
        raise RuntimeError(f"{what}: {text.value.decode() if text.value else result}")


class Kernel:
    """One entry point with its constants."""

    def __init__(self, source, entry, shared=0, **constants):
        self.source, self.entry, self.shared, self.constants = source, entry, shared, constants

    def key(self):
        return self.source, tuple(sorted(self.constants.items()))

    def compile(self, out):
        defines = [f"-D{name}={value}" for name, value in self.constants.items()]
        command = ["nvcc", "-cubin", "-gencode=arch=compute_90a,code=sm_90a", "-std=c++17", "-I", str(ROOT / "kernels"), *defines]
        subprocess.run([*command, str(ROOT / "kernels" / self.source), "-o", str(out)], check=True, capture_output=True)

    def load(self, cubin):
        module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        check(cuda.cuModuleLoad(ctypes.byref(module), str(cubin).encode()), self.entry)
        check(cuda.cuModuleGetFunction(ctypes.byref(self.function), module, self.entry.encode()), self.entry)
        check(cuda.cuFuncSetAttribute(self.function, MAX_DYNAMIC_SHARED, self.shared), self.entry)
        check(cuda.cuFuncSetAttribute(self.function, NON_PORTABLE_CLUSTER, 1), self.entry)

    def config(self, grid, block, cluster=1, overlaps=False):
        attributes = (Attribute * 2)()
        attributes[0].id = CLUSTER_DIMENSION
        attributes[0].value[0], attributes[0].value[1], attributes[0].value[2] = cluster, 1, 1
        attributes[1].id, attributes[1].value[0] = PROGRAMMATIC_SERIALIZATION, 1
        config = Config(grid, 1, 1, block, 1, 1, self.shared, None, attributes, 2 if overlaps else 1)
        config.kept = attributes  # the structure holds an address only
        return config

    def resident_clusters(self, config):
        count = ctypes.c_int()
        check(cuda.cuOccupancyMaxActiveClusters(ctypes.byref(count), self.function, ctypes.byref(config)), self.entry)
        return count.value

    def launcher(self, config, params):
        def launch():
            buffer = ctypes.create_string_buffer(params, len(params))
            arguments = (ctypes.c_void_p * 1)(ctypes.cast(buffer, ctypes.c_void_p))
            config.stream = torch.cuda.current_stream().cuda_stream
            check(cuda.cuLaunchKernelEx(ctypes.byref(config), self.function, arguments, None), self.entry)
        return launch


# How P V is computed: e4m3 with either row maximum, or integers (recipe i8-i8-dyn).
KINDS = ("running", "lazy", "integers")
# The types that the recipe `half` is timed in; IN_T, and what tensor maps call it (CUtensorMapDataType).
HALVES = {"half F16": torch.float16, "half BF16": torch.bfloat16}
HALF_TYPES = {torch.float16: ("F16", 6), torch.bfloat16: ("Bf16", 9)}


def stage_bytes(head_dim):
    """K and V of a tile, K's scales and two barriers."""
    return 256 * head_dim + 32


def attention(head_dim, causal, kind):
    """The variant that a plan chooses (`tile` in crates/sageattn-cuda/src/plan.rs)."""
    consumers = 2 if head_dim == 256 else 3
    stages = {64: 8, 128: 4, 256: 2}[head_dim]
    shared = consumers * (68 * head_dim + 16) + stages * stage_bytes(head_dim) + 16 * head_dim + 384
    constants = dict(HEAD_DIM=head_dim, IN_T="F16", CUT_OCTET=0, CAUSAL=int(causal), LSE=0, INT8_PV=int(kind == "integers"), RUNNING_MAX=int(kind != "lazy"), CONSUMERS=consumers, STAGES=stages)
    return Kernel("sm90/attn_i8_f8.cu", "attn_i8_i8_sm90" if kind == "integers" else "attn_i8_f8_sm90", shared, **constants)


def preparation(head_dim, heads, tiles, kind):
    """The launch that a plan chooses for f16 (crates/sageattn-cuda/src/plan/prepare.rs), cluster size and tiles of a block."""
    for blocks, slots, wanted, most in {64: [(3, 4, 4, 4), (2, 6, 4, 32)], 128: [(2, 3, 3, 3), (1, 6, 4, 32)], 256: [(1, 3, 2, 16)]}[head_dim]:
        cluster = 1
        while cluster < 16:
            each = -(-tiles // cluster)
            idle = 2 * heads * cluster < blocks * MULTIPROCESSORS
            if not (each > wanted or (idle and each > 1 and cluster < 4)):
                break
            cluster *= 2
        each = -(-tiles // cluster)
        if each <= most and 4 * heads * cluster >= MULTIPROCESSORS:
            rows = (512 if head_dim == 256 else 256) // 32 + 2
            shared = slots * 128 * head_dim * 2 + rows * head_dim * 4 + 48 + 8 * (slots + 2)
            constants = dict(HEAD_DIM=head_dim, IN_T="F16", CUT_OCTET=1, SMOOTH=1, INT8_PV=int(kind == "integers"), SLOTS=slots, BLOCKS=blocks)
            kernel = Kernel("sm90/kv_prepare.cu", "kv_prepare_sm90", shared, **constants)
            return kernel, cluster, each, blocks == 1 and each <= slots
    raise ValueError("this shape is prepared in two launches: not in this comparison")


def half_tile(head_dim, causal, length):
    """What plans choose (`tile` in crates/sageattn-cuda/src/plan/half.rs)."""
    keys, stages = {64: (128, 5), 128: (128, 3), 256: (80, 2)}[head_dim]
    padded = lambda keys: -(-length // keys) * keys
    if head_dim == 64 and not causal and 16 * padded(192) <= 17 * padded(128):
        keys, stages = 192, 4
    return dict(CONSUMERS=2, KEYS=keys, Q_SLOTS=1, K_STAGES=stages, V_STAGES=stages, TURNS=int(head_dim == 128 and causal))


def heads_together(heads, bytes_of_codes):
    """Heads whose blocks are drawn in turn, the longest first (crates/sageattn-cuda/src/plan.rs)."""
    most = max(1, min((16 << 20) // (2 * bytes_of_codes), MULTIPROCESSORS // 2))
    return -(-heads // -(-heads // most))


class Ours:
    """A call of ours on tensors of [batch, heads, length, head_dim]."""

    def __init__(self, shape, causal, kind):
        self.shape, self.causal = shape, causal
        batch, heads, length, head_dim = shape
        self.attend = attention(head_dim, causal, kind)
        self.prepare, self.cluster, self.each, self.turns = preparation(head_dim, batch * heads, -(-length // 128), kind)
        self.kernels = [self.attend, self.prepare]

    def bind(self, q, k, v):
        batch, heads, length, head_dim = self.shape
        pairs, tiles = batch * heads, -(-length // 128)
        consumers = self.attend.constants["CONSUMERS"]
        bytes_of = dict(sums=pairs * 32 * head_dim * 4, maxima=pairs * 32 * head_dim * 4, mean=pairs * head_dim * 4, v_scales=pairs * head_dim * 4,
                        v_residuals=pairs * tiles * head_dim * 4, k_scales=pairs * tiles * 16, k_codes=pairs * tiles * 128 * head_dim, v_codes=pairs * tiles * 128 * head_dim, next_work=256)
        self.scratch = {name: torch.empty(size, dtype=torch.uint8, device="cuda") for name, size in bytes_of.items()}
        self.o = torch.full_like(q, float("nan"))
        at = {name: tensor.data_ptr() for name, tensor in self.scratch.items()}
        strides = lambda x: x.stride()[:3]
        prepare = struct.pack("<10Q6q8IQ", k.data_ptr(), v.data_ptr(), *(at[n] for n in ("sums", "maxima", "mean", "v_scales", "v_residuals", "k_scales", "k_codes", "v_codes")),
                              *strides(k), *strides(v), heads, length, head_dim, tiles, self.cluster, self.each, length, pairs, at["next_work"])
        row_blocks = -(-length // (64 * consumers))
        attend = struct.pack("<9Q6q9IfqQ", q.data_ptr(), self.o.data_ptr(), 0, *(at[n] for n in ("k_codes", "v_codes", "k_scales", "v_scales", "v_residuals", "mean")),
                             *strides(q), *strides(self.o), batch, heads, 1, length, length, head_dim, tiles, row_blocks, heads_together(pairs, tiles * 128 * head_dim) if self.causal else 1,
                             head_dim ** -0.5, 0, at["next_work"])
        threads = 512 if head_dim == 256 else 256
        config = self.prepare.config(2 * pairs * self.cluster, threads, self.cluster)
        if self.turns:
            config = self.prepare.config(min(2 * pairs, self.prepare.resident_clusters(config)) * self.cluster, threads, self.cluster)
        grid, block = min(pairs * row_blocks, MULTIPROCESSORS), 128 * (consumers + 1)
        self.prepared = self.prepare.launcher(config, prepare)
        self.alone = self.attend.launcher(self.attend.config(grid, block), attend)
        follow = self.attend.launcher(self.attend.config(grid, block, overlaps=True), attend)

        def whole():
            self.prepared()
            follow()
        self.whole = whole
        whole()
        return self


class Half:
    """A call of recipe `half`: one launch, which reads the tensors by tensor maps."""

    def __init__(self, shape, causal, dtype):
        self.shape, self.causal, self.dtype = shape, causal, dtype
        head_dim = shape[3]
        tile = half_tile(head_dim, causal, shape[2])
        row = 2 * head_dim
        stages = tile["K_STAGES"] + tile["V_STAGES"]
        shared = row * (64 * tile["CONSUMERS"] * tile["Q_SLOTS"] + tile["KEYS"] * stages) + 16 * (tile["Q_SLOTS"] + stages)
        constants = dict(HEAD_DIM=head_dim, IN_T=HALF_TYPES[dtype][0], CUT_OCTET=0, CAUSAL=int(causal), LSE=0, **tile)
        self.attend = Kernel("sm90/attn_half.cu", "attn_half_sm90", shared, **constants)
        self.kernels = [self.attend]

    def bind(self, q, k, v):
        batch, heads, length, head_dim = self.shape
        tile = self.attend.constants
        rows = 64 * tile["CONSUMERS"]
        self.tensors = q, k, v = [x.to(self.dtype) for x in (q, k, v)]
        self.o = torch.full_like(q, float("nan"))
        row_blocks = -(-length // rows)
        items = batch * heads * (-(-row_blocks // 2) if self.causal else row_blocks)
        maps = tensor_map(q, rows) + tensor_map(k, tile["KEYS"]) + tensor_map(v, tile["KEYS"])
        params = maps + struct.pack("<2Q4q8If11I", self.o.data_ptr(), 0, *self.o.stride()[:3], 0, batch * heads, heads, 1, length, length, head_dim,
                                    row_blocks, items, head_dim ** -0.5, *[0] * 11)
        config = self.attend.config(min(items, MULTIPROCESSORS), 128 * (tile["CONSUMERS"] + 1))
        self.whole = self.attend.launcher(config, params)
        self.whole()
        return self


def tensor_map(tensor, rows):
    """A tensor of [batch, heads, length, head_dim] in boxes of 64 channels and `rows` rows, 128-byte swizzle, 256-byte L2 promotion."""
    memory = ctypes.create_string_buffer(192)
    at = -(-ctypes.addressof(memory) // 64) * 64
    wide, narrow = ctypes.c_uint64, ctypes.c_uint32
    extents = (wide * 4)(*reversed(tensor.shape))
    strides = (wide * 3)(*(2 * stride for stride in tensor.stride()[2::-1]))
    box, steps = (narrow * 4)(64, rows, 1, 1), (narrow * 4)(1, 1, 1, 1)
    plain, swizzle_128, promote_256 = 0, 3, 3
    check(cuda.cuTensorMapEncodeTiled(ctypes.c_void_p(at), HALF_TYPES[tensor.dtype][1], 4, ctypes.c_void_p(tensor.data_ptr()), extents, strides, box, steps, plain, swizzle_128,
                                      promote_256, 0), "tensor map")
    return ctypes.string_at(at, 128)


def sdpa(backend, dtype):
    def make(q, k, v, causal):
        tensors = [x.to(dtype) for x in (q, k, v)]

        def call():
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*tensors, is_causal=causal)
        return call
    return make


def flash3(dtype):
    def make(q, k, v, causal):
        import fa3_fwd_interface
        nhd = [x.transpose(1, 2).contiguous().to(dtype) for x in (q, k, v)]
        return lambda: fa3_fwd_interface.flash_attn_func(*nhd, causal=causal)
    return make


def cudnn_fp8(q, k, v, causal, scale_p=1.0, scale_o=1.0):
    import cudnn
    handle = cudnn.create_handle()
    data = [x.to(torch.float8_e4m3fn).contiguous() for x in (q, k, v)]
    graph = cudnn.pygraph(io_data_type=cudnn.data_type.FP8_E4M3, intermediate_data_type=cudnn.data_type.FLOAT,
                          compute_data_type=cudnn.data_type.FLOAT, handle=handle)
    inputs = [graph.tensor_like(x.view(torch.int8)) for x in data]
    for x in inputs:
        x.set_data_type(cudnn.data_type.FP8_E4M3)
    values = [torch.full((1, 1, 1, 1), value, device="cuda") for value in (1.0, 1.0, 1.0, 1 / scale_p, scale_p, scale_o)]
    scales = [graph.tensor_like(x) for x in values]
    names = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
    out, _, amax_s, amax_o = graph.sdpa_fp8(q=inputs[0], k=inputs[1], v=inputs[2], **dict(zip(names, scales)), generate_stats=False,
                                            attn_scale=q.shape[-1] ** -0.5, use_causal_mask=causal)
    result = torch.empty_like(data[0])
    out.set_output(True).set_dim(list(result.shape)).set_stride(list(result.stride())).set_data_type(cudnn.data_type.FP8_E4M3)
    maxima = [torch.empty(1, 1, 1, 1, device="cuda") for _ in range(2)]
    for tensor in (amax_s, amax_o):
        tensor.set_output(True).set_dim([1] * 4).set_stride([1] * 4).set_data_type(cudnn.data_type.FLOAT)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device="cuda")
    pack = dict(zip(inputs, data)) | dict(zip(scales, values)) | {out: result, amax_s: maxima[0], amax_o: maxima[1]}

    def call():
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        graph.execute(pack, workspace, handle=handle)
        return result
    return call


PEERS = {"cuDNN FP8": cudnn_fp8, "FA3 FP8": flash3(torch.float8_e4m3fn), "FA3 BF16": flash3(torch.bfloat16),
         "cuDNN F16": sdpa(SDPBackend.CUDNN_ATTENTION, torch.float16), "cuDNN BF16": sdpa(SDPBackend.CUDNN_ATTENTION, torch.bfloat16)}


def replayed(call):
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def median_us(call, budget_ms):
    def once():
        start, end = torch.cuda.Event(True), torch.cuda.Event(True)
        start.record()
        call()
        end.record()
        return start, end
    call()
    start, end = once()
    torch.cuda.synchronize()
    runs = max(3, min(3000, int(budget_ms / max(start.elapsed_time(end), 1e-3))))
    pairs = [once() for _ in range(runs)]
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) * 1e3


def normal(shape, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(shape, device="cuda", generator=generator).half() for _ in range(3)]


def exact(q, k, v, causal):
    """In blocks of rows: the scores of all would not fit."""
    k, v, rows = k.double().transpose(-1, -2), v.double(), []
    for first in range(0, q.shape[2], 4096):
        scores = q[:, :, first : first + 4096].double() @ k * q.shape[-1] ** -0.5
        if causal:
            scores.masked_fill_(torch.ones(scores.shape[-2:], dtype=torch.bool, device="cuda").triu(first + 1), float("-inf"))
        rows.append(torch.softmax(scores, -1) @ v)
    return torch.cat(rows, 2)


def fp8_peers(q, k, v, causal, want):
    """What the FP8 peers give for casts of the tensors: FA3 in bf16; cuDNN in e4m3, with P on 256 and O on the scale that suits its largest magnitude."""
    scale = 448 / want.abs().max().item()
    results = {"FA3 FP8": lambda: PEERS["FA3 FP8"](q, k, v, causal)().transpose(1, 2).double(),
               "cuDNN FP8": lambda: cudnn_fp8(q, k, v, causal, 256.0, scale)().double() / scale}
    for name, result in results.items():
        try:
            yield name, result()
        except Exception as error:
            print(f"{name} left out: {str(error).splitlines()[0] if str(error) else type(error).__name__}", file=sys.stderr)


def parse(text):
    dims, _, mask = text.partition(":")
    return tuple(map(int, dims.split("x"))), mask == "causal"


def accuracy():
    """Relative L1 against float64: 1 x 2 heads, mean of five seeds."""
    cases = [((1, 32, 2048, 128), False, 0.0), ((1, 32, 16384, 128), False, 0.0), ((1, 32, 65536, 128), False, 0.0), ((1, 32, 2048, 64), False, 0.0), ((1, 32, 16384, 64), False, 0.0), ((1, 32, 4096, 128), True, 0.0), ((1, 32, 4096, 128), False, 8.0)]
    names = [*KINDS, "FA3 FP8", "cuDNN FP8"]
    print("\n| data | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1))
    for shape, causal, bias in cases:
        ours = {kind: Ours(shape, causal, kind) for kind in KINDS}
        build(ours.values())
        errors = {name: [] for name in names}
        for seed in range(5):
            q, k, v = normal(shape, seed)
            if bias:
                k = (k.float() + bias * torch.randn(1, shape[1], 1, shape[3], device="cuda", generator=torch.Generator("cuda").manual_seed(99 + seed))).half()
            want = exact(q[:, :2], k[:, :2], v[:, :2], causal)
            results = [(name, call.bind(q, k, v).o[:, :2].double()) for name, call in ours.items()]
            results += fp8_peers(*(x[:, :2].contiguous() for x in (q, k, v)), causal, want)
            for name, got in results:
                errors[name].append(((got - want).abs().sum() / want.abs().sum()).item())
        label = f"{shape[2]} x {shape[3]}{' causal' if causal else ''}{f', K bias {bias:g} sigma' if bias else ''}"
        print(f"| {label} | " + " | ".join(f"{statistics.mean(e):.5f}" if e else "-" for e in errors.values()) + " |", flush=True)


def stages():
    """Each kernel with each number of stages that shared memory has room for, against the first."""
    for text in ("2x8x1000x64", "2x8x1000x128:causal", "2x8x1000x128", "2x8x700x256"):
        shape, causal = parse(text)
        q, k, v = normal(shape, 0)
        for kind in KINDS:
            calls = {}
            for count in (1, 2, 4, 8):
                call = calls[count] = Ours(shape, causal, kind)
                call.attend.shared += (count - call.attend.constants["STAGES"]) * stage_bytes(shape[3])
                call.attend.constants["STAGES"] = count
            calls = {count: call for count, call in calls.items() if call.attend.shared <= SHARED_MEMORY}
            build(calls.values())
            first, *others = (call.bind(q, k, v).o for call in calls.values())
            same = not first.isnan().any() and all(torch.equal(first, other) for other in others)
            print(f"{text} {kind}: {', '.join(map(str, calls))} stages: {'the same bits' if same else 'DIFFERENT'}", flush=True)


def build(ours):
    kernels = [kernel for call in ours for kernel in call.kernels]
    folder = pathlib.Path(tempfile.gettempdir()) / "sageattn-compare"
    folder.mkdir(exist_ok=True)
    cubin = {kernel.key(): folder / f"{abs(hash(kernel.key()))}.cubin" for kernel in kernels}
    first = {kernel.key(): kernel for kernel in kernels if not cubin[kernel.key()].exists()}
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda item: item[1].compile(cubin[item[0]]), first.items()))
    for kernel in kernels:
        kernel.load(cubin[kernel.key()])


def compare(texts):
    shuffled = random.Random(0)
    names = [f"{kind}, {part}" for kind in KINDS for part in ("alone", "whole")] + [*HALVES, *PEERS, "preparation, us"]
    print("| shape | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1))
    timed = lambda text: [kind for kind in KINDS if kind != "running" or parse(text)[0][2] <= RUNNING_UP_TO]
    ours = {(text, kind): Ours(*parse(text), kind) for text in texts for kind in timed(text)}
    halves = {(text, name): Half(*parse(text), dtype) for text in texts if parse(text)[0][2] <= HALF_UP_TO for name, dtype in HALVES.items()}
    build([*ours.values(), *halves.values()])
    for text in texts:
        shape, causal = parse(text)
        q, k, v = normal(shape, 0)
        bound = {kind: ours[text, kind].bind(q, k, v) for kind in timed(text)}
        calls = {f"{kind}, {part}": getattr(call, part) for kind, call in bound.items() for part in ("alone", "whole")}
        without = {name: halves[text, name].bind(q, k, v) for name in HALVES if (text, name) in halves}
        calls |= {name: call.whole for name, call in without.items()}
        for name, make in PEERS.items():
            try:
                calls[name] = make(q, k, v, causal)
                calls[name]()
            except Exception as error:
                print(f"{name} left out for {text}: {str(error).splitlines()[0] if str(error) else type(error).__name__}", file=sys.stderr)
                calls.pop(name, None)
        calls["preparation, us"] = bound["lazy"].prepared
        if shape[2] <= GRAPHS_UP_TO:
            calls = {name: replayed(call) for name, call in calls.items()}
        times = {name: [] for name in calls}
        order = list(calls.items())
        for _ in range(ROUNDS):
            shuffled.shuffle(order)
            for name, call in order:
                times[name].append(median_us(call, BUDGET_MS if shape[2] <= GRAPHS_UP_TO else BUDGET_BEYOND_MS))
        batch, heads, length, head_dim = shape
        operations = 4 * batch * heads * length * length * head_dim / (2 if causal else 1)
        cells = []
        for name in names:
            us = statistics.median(times[name]) if name in times else None
            cells.append("-" if us is None else f"{us:.0f}" if name.endswith("us") else f"{operations / us / 1e6:.0f} ({us:.1f})" if length <= GRAPHS_UP_TO else f"{operations / us / 1e6:.0f}")
        print(f"| {text.replace(':', ' ')} | " + " | ".join(cells) + " |", flush=True)
        del calls, q, k, v
        for call in bound.values():
            call.scratch = call.o = None
        for call in without.values():
            call.tensors = call.o = None


if __name__ == "__main__":
    print(f"{torch.cuda.get_device_name()}, {MULTIPROCESSORS} multiprocessors, PyTorch {torch.__version__}\n")
    if sys.argv[1:] == ["stages"]:
        stages()
    else:
        compare(sys.argv[1:] or FULL + CAUSAL)
    if len(sys.argv) == 1:
        accuracy()
