// Polar factors of a batch: a warp or a block a matrix.
#include "launch.cuh"
#include "library.h"
#include "rotate.cuh"

namespace fedrot::cuda {
namespace {

constexpr int threads = 128, warps = threads / warp_threads;

template <int Rank, class T>
__global__ void __launch_bounds__(threads, 1) polar(const Polar batch) {
  const Integer size = batch.rows * batch.n;
  const Integer index =
      Rank > warp_threads ? Integer(blockIdx.x) : Integer(blockIdx.x) * warps + warp_index();
  if (index >= batch.count) return;
  const Partials<T> M{static_cast<const T*>(batch.M) + index * size, 0, 1, int(batch.rows),
                      int(batch.n)};
  const Wanted<T> wanted{T(1), batch.proper != 0, T(1), static_cast<T*>(batch.out) + index * size};
  const Pool pool{batch.workspaces, batch.taken, int(batch.slots), workspace_elements(batch.n)};
  if constexpr (Rank > warp_threads)
    rotate_by_block(M, wanted, static_cast<double*>(shared_memory()), pool);
  else
    rotate_by_warp<Rank>(
        M, wanted, static_cast<T*>(shared_memory()) + warp_index() * newton_scratch(Rank), pool);
}

template <int Rank, class T>
const char* launch_polar(const Polar& batch, cudaStream_t stream) {
  if constexpr (Rank > warp_threads)
    return launch(polar<Rank, T>, batch.count, threads, 64 * sizeof(double), stream, batch);
  else
    return launch(polar<Rank, T>, (batch.count + warps - 1) / warps, threads,
                  warps * newton_scratch(Rank) * sizeof(T), stream, batch);
}

template <class T>
const char* polar_of(const Polar& batch, cudaStream_t stream) {
  if (batch.n <= 8) return launch_polar<8, T>(batch, stream);
  if (batch.n <= 32) return launch_polar<32, T>(batch, stream);
  return launch_polar<64, T>(batch, stream);
}

}  // namespace
}  // namespace fedrot::cuda

const char* fedrot_cuda_polar(const fedrot::cuda::Polar* batch, void* stream) {
  const auto in = static_cast<cudaStream_t>(stream);
  return batch->is_double ? fedrot::cuda::polar_of<double>(*batch, in)
                          : fedrot::cuda::polar_of<float>(*batch, in);
}
