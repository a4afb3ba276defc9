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

template <typename Key, int kQueries>
int64_t dense_memory(const Call& call) {
  const int64_t staged = static_cast<int64_t>(kQueries) * staged_width(call.width) * 4;
  return Dense<Key, kQueries>::kQueriesAt + staged;
}

template <typename Key, int kQueries>
int launch_dense_of(const Call& call, int blocks, void* stream) {
  const dim3 grid(blocks, (call.batch + kQueries - 1) / kQueries);
  return launch(dense_kernel<Key, kQueries>, call, grid, kThreads,
                dense_memory<Key, kQueries>(call), stream);
}

// As many queries at a time as there are and as fit.
template <typename Key>
int launch_dense_of(const Call& call, int blocks, const Device& device, void* stream) {
  if (call.batch > 4 && dense_memory<Key, 8>(call) <= device.shared_memory) {
    return launch_dense_of<Key, 8>(call, blocks, stream);
  }
  if (call.batch > 1 && dense_memory<Key, 4>(call) <= device.shared_memory) {
    return launch_dense_of<Key, 4>(call, blocks, stream);
  }
  if (dense_memory<Key, 1>(call) <= device.shared_memory) {
    return launch_dense_of<Key, 1>(call, blocks, stream);
  }
  return kTooWide;
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
