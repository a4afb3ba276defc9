// csrc/cuda/launch.h for a host: the same kernels, run by on_host.h.
//
// Blocks are smaller than on a GPU, and how many are there at once differs from launch to launch.
// The nodes of a look-up are run together, because one may start before the other has ended.
#include "launch.h"

#include "dense.cuh"
#include "indexed.cuh"
#include "on_host_order.h"

namespace grace_fast::device {

OnHostOrder& order() {
  static OnHostOrder order;
  return order;
}

namespace {

// What is launched, until it is run as one stream.
std::vector<on_host::Grid>& launched() {
  static std::vector<on_host::Grid> grids;
  return grids;
}

int launch(const char* name, void (*kernel)(Call), const Call& call, int blocks, int groups,
           int threads, int64_t shared, bool early = false) {
  order().launched.emplace_back(name);
  launched().push_back({blocks, groups, threads, static_cast<size_t>(shared),
                        early && order().seed % 4 != 0, [kernel, call] { kernel(call); }});
  return 0;
}

// The memory of a call that kernels write and others may read.
std::vector<on_host::Piece> written(const Call& call, int blocks) {
  std::vector<on_host::Piece> pieces;
  const auto add = [&](auto* at, int64_t count, bool carried = false) {
    if (at) pieces.push_back({reinterpret_cast<char*>(at), count * sizeof *at, carried});
  };
  const Workspace& workspace = call.workspace;
  const int64_t batch = call.batch, padded = (call.width + kPadding - 1) / kPadding * kPadding;
  add(workspace.tickets, 2 * kMostQueries, true);
  add(workspace.handout, kMostQueries, true);
  add(workspace.replaced, batch);
  add(workspace.sums, batch * kSlots);
  add(workspace.squares, batch * 2);
  add(workspace.encoded, batch);
  add(workspace.best, batch * blocks);
  add(workspace.wide, batch * padded);
  add(call.hit, batch);
  add(call.row, batch);
  add(call.squared, batch);
  return pieces;
}

template <typename Key, int kQueries>
int launch_dense_of(const Call& call, int blocks) {
  const int64_t rings = static_cast<int64_t>(order().threads / kWarp) * kRingBytes;
  return launch("dense_kernel", dense_kernel<Key, kQueries>, call, blocks,
                (call.batch + kQueries - 1) / kQueries, order().threads,
                Dense<Key, kQueries>::ring_at(call.width) + rings);
}

template <typename Key>
int launch_dense_of(const Call& call, int blocks) {
  if (call.batch > 4) return launch_dense_of<Key, 8>(call, blocks);
  if (call.batch > 1) return launch_dense_of<Key, 4>(call, blocks);
  return launch_dense_of<Key, 1>(call, blocks);
}

template <typename Key>
int launch_indexed_of(const Call& call, int blocks) {
  launch("encode_kernel", encode_kernel, call, kEncodeBlocks, call.batch, 64, sizeof(EncodeShared));
  return launch("indexed_kernel", indexed_kernel<Key>, call, blocks, 1, order().threads,
                sizeof(IndexedShared), true);
}

}  // namespace

int device_count(int* count) {
  *count = 1;
  return 0;
}
int describe_device(int index, Device* device) {
  *device = {3, 1 << 20, 9, 0, index};
  return 0;
}
const char* error_text(int) { return "none"; }

int launch_look_up(const Call& call, bool indexed, int blocks, const Device&, void*) {
  launched().clear();
  const int size = call.query_dtype == Dtype::float32 ? 4 : 2;
  const auto* queries = static_cast<const char*>(call.queries);
  const int64_t elements = (call.batch - 1) * call.query_stride + call.width;
  const on_host::Announced for_this_launch({queries, queries + elements * size});
  const int error = with_key(call.key_dtype, [&](auto key) {
    return indexed ? launch_indexed_of<decltype(key)>(call, blocks)
                   : launch_dense_of<decltype(key)>(call, blocks);
  });
  const on_host::Grid& last = launched().back();
  on_host::loads().assign(static_cast<size_t>(last.blocks * last.groups), 0);
  on_host::run(std::move(launched()), written(call, blocks), order().seed++);
  return error;
}

int capture_of(void*, uint64_t* capture) {
  *capture = order().capture;
  return 0;
}

}  // namespace grace_fast::device
