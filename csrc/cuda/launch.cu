// The kernels' instances and their launches.
//
// A look-up that reads every key is one node of a graph, whatever it writes. One by the index is
// two nodes, `encode` and `indexed`; from sm_90 on the second is started while the first still
// runs, and waits where it first needs it.
#include "dense.cuh"
#include "indexed.cuh"
#include "launch.h"

namespace grace_fast::device {
namespace {

constexpr int kThreads = kMostThreads;
constexpr int kUsualSharedMemory = 48 << 10;

using Kernel = void (*)(Call);

// Launch a kernel with as much shared memory as it asks for.
int launch(Kernel kernel, const Call& call, dim3 blocks, int threads, int64_t shared, void* stream,
           bool early = false) {
  if (shared > kUsualSharedMemory) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) {
      cudaGetLastError();
      return error;
    }
  }
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, call);
}

constexpr int kManyWarps = kThreads / kWarp;
constexpr int kEnoughWarps = kManyWarps / 2;  // else fewer queries at a time are faster
constexpr int kLeastWarps = 2;

// How many warps of a block have room for their rings.
template <typename Key, int kQueries>
int64_t dense_warps(const Call& call, int blocks, const Device& device) {
  const int64_t most = blocks < device.multiprocessors ? kFewWarps : kManyWarps;
  const int64_t left = device.shared_memory - Dense<Key, kQueries>::ring_at(call.width);
  return std::min(most, left / kRingBytes);
}

template <typename Key, int kQueries>
int launch_dense_of(const Call& call, int blocks, const Device& device, void* stream) {
  const int64_t warps = dense_warps<Key, kQueries>(call, blocks, device);
  if (warps < kLeastWarps) return kTooWide;
  const dim3 grid(blocks, (call.batch + kQueries - 1) / kQueries);
  return launch(dense_kernel<Key, kQueries>, call, grid, static_cast<int>(warps) * kWarp,
                Dense<Key, kQueries>::ring_at(call.width) + warps * kRingBytes, stream);
}

// As many queries at a time as there are and as leave room for the warps.
template <typename Key>
int launch_dense_of(const Call& call, int blocks, const Device& device, void* stream) {
  const int64_t enough = blocks < device.multiprocessors ? kFewWarps : kEnoughWarps;
  if (call.batch > 4 && dense_warps<Key, 8>(call, blocks, device) >= enough) {
    return launch_dense_of<Key, 8>(call, blocks, device, stream);
  }
  if (call.batch > 1 && dense_warps<Key, 4>(call, blocks, device) >= enough) {
    return launch_dense_of<Key, 4>(call, blocks, device, stream);
  }
  return launch_dense_of<Key, 1>(call, blocks, device, stream);
}

template <typename Key>
int launch_indexed_of(const Call& call, int blocks, const Device& device, void* stream) {
  const dim3 grid(kEncodeBlocks, call.batch);
  const int error = launch(encode_kernel, call, grid, kEncodeThreads, sizeof(EncodeShared), stream);
  if (error) return error;
  return launch(indexed_kernel<Key>, call, dim3(blocks), kThreads, sizeof(IndexedShared), stream,
                device.major >= 9);
}

}  // namespace

int device_count(int* count) {
  const cudaError_t error = cudaGetDeviceCount(count);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

int describe_device(int index, Device* device) {
  device->index = index;
  const struct {
    cudaDeviceAttr attribute;
    int* value;
  } wanted[] = {
      {cudaDevAttrMultiProcessorCount, &device->multiprocessors},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, &device->shared_memory},
      {cudaDevAttrComputeCapabilityMajor, &device->major},
      {cudaDevAttrComputeCapabilityMinor, &device->minor},
  };
  for (const auto& each : wanted) {
    const cudaError_t error = cudaDeviceGetAttribute(each.value, each.attribute, index);
    if (error != cudaSuccess) {
      cudaGetLastError();
      return error;
    }
  }
  return cudaSuccess;
}

const char* error_text(int error) {
  if (error == kTooWide) return "a query of this width does not fit in shared memory";
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

int launch_look_up(const Call& call, bool indexed, int blocks, const Device& device, void* stream) {
  // This library is linked with a runtime of its own, whose kernels are loaded for the device that
  // is current to it. Nobody else asks this runtime, and the caller has made the same device
  // current to torch's: there is nothing to put back.
  if (const cudaError_t error = cudaSetDevice(device.index); error != cudaSuccess) {
    cudaGetLastError();
    return error;
  }
  return with_key(call.key_dtype, [&](auto key) {
    return indexed ? launch_indexed_of<decltype(key)>(call, blocks, device, stream)
                   : launch_dense_of<decltype(key)>(call, blocks, device, stream);
  });
}

int capture_of(void* stream, uint64_t* capture) {
  cudaStreamCaptureStatus status{};
  unsigned long long number = 0;
  const cudaError_t error =
      cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &number);
  if (error != cudaSuccess) cudaGetLastError();
  *capture = status == cudaStreamCaptureStatusActive ? number : 0;
  return error;
}

}  // namespace grace_fast::device
