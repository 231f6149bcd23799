// Runs one program forward and backward without Python, on the engine of one target and element.
//
//     test_engine TARGET ELEMENT THREADS IN OUT
//
// tests/test_engine_cross.py writes IN and reads OUT: arrays in native byte order, in the order of main() below, each
// preceded in IN by the number of its elements.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/cpu/dispatch.h"
#include "check.h"

using namespace trmfast;

namespace {

using Bytes = std::vector<unsigned char>;

template <class T> std::vector<T> read(std::FILE* file) {
  int32_t count = 0;
  CHECK(std::fread(&count, sizeof count, 1, file) == 1 && count >= 0);
  std::vector<T> values(static_cast<size_t>(count));
  CHECK(std::fread(values.data(), sizeof(T), values.size(), file) == values.size());
  return values;
}

void write(std::FILE* file, const Bytes& bytes) {
  CHECK(std::fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size());
}

// All ones is NaN in both element types.
Bytes poisoned(size_t bytes) { return Bytes(bytes, 0xff); }

template <class T> std::vector<T*> pointers(std::vector<Bytes>& arrays) {
  std::vector<T*> result;
  for (Bytes& array : arrays) result.push_back(reinterpret_cast<T*>(array.data()));
  return result;
}

} // namespace

int main(int argc, char** argv) {
  CHECK(argc == 6);
  const Engine& engine = find_engine(argv[1], argv[2]);
  const int threads = std::atoi(argv[3]);
  const size_t element_bytes = std::strcmp(argv[2], "f32") == 0 ? 4 : 2;
  std::FILE* in = std::fopen(argv[4], "rb");
  CHECK(in);

  // B, L, D, then the rest of the block, layers, nets, states, whether there is x, whether there are tables.
  const std::vector<int32_t> sizes = read<int32_t>(in);
  CHECK(sizes.size() == 17);
  const float eps = read<float>(in).at(0);
  const BlockShape block = {sizes[2],      sizes[3], sizes[4] != 0, sizes[5],  sizes[6], sizes[7],
                            sizes[8] != 0, sizes[9], sizes[10],     sizes[11], eps};
  const int num_nets = sizes[13], num_states = sizes[14];
  const NetShape net = {block, sizes[12]};

  std::vector<Update> updates;
  std::vector<int> sources;
  size_t with_gradient = 0;
  const std::vector<int32_t> rows = read<int32_t>(in); // dst, inject_x, net, grad, number of sources, sources
  for (size_t i = 0; i < rows.size(); i += 5 + static_cast<size_t>(rows[i + 4])) {
    updates.push_back(
        {rows[i], static_cast<int>(sources.size()), rows[i + 4], rows[i + 1] != 0, rows[i + 2], rows[i + 3] != 0});
    sources.insert(sources.end(), &rows[i + 5], &rows[i + 5] + rows[i + 4]);
    with_gradient += rows[i + 3] != 0;
  }

  std::vector<PackedNet> packed;
  std::vector<std::unique_ptr<PackedWeights>> packs;
  std::vector<Bytes> grad_weights;
  for (int n = 0; n < num_nets; ++n) {
    std::vector<std::vector<float>> weights;
    std::vector<const float*> addresses;
    for (int w = 0; w < net.layers * block_weights(block); ++w) {
      weights.push_back(read<float>(in));
      grad_weights.push_back(poisoned(weights.back().size() * sizeof(float)));
    }
    for (const auto& weight : weights) addresses.push_back(weight.data());
    packs.push_back(std::make_unique<PackedWeights>(engine, net, addresses, true, threads));
    packed.push_back(packs.back()->view());
  }

  std::vector<Bytes> states, grad_states_out, states_out, grad_states;
  for (int s = 0; s < num_states; ++s) states.push_back(read<unsigned char>(in));
  for (int s = 0; s < num_states; ++s) grad_states_out.push_back(read<unsigned char>(in));
  const Bytes x = read<unsigned char>(in);
  const std::vector<float> cos = read<float>(in), sin = read<float>(in);
  std::fclose(in);

  const size_t elements = states[0].size() / element_bytes;
  for (int s = 0; s < num_states; ++s) {
    states_out.push_back(poisoned(states[0].size()));
    grad_states.push_back(poisoned(elements * sizeof(float)));
  }
  Bytes grad_x = poisoned(x.size() / element_bytes * sizeof(float));
  Bytes saved = poisoned(with_gradient * states[0].size());

  const std::vector<NetShape> nets(static_cast<size_t>(num_nets), net);
  const Job job = {sizes[0],
                   sizes[1],
                   sizes[2],
                   {updates.data(), static_cast<int>(updates.size()), sources.data(), num_states},
                   nets.data(),
                   packed.data(),
                   num_nets,
                   sizes[16] ? cos.data() : nullptr,
                   sizes[16] ? sin.data() : nullptr,
                   threads,
                   nullptr,
                   nullptr};
  const auto from = pointers<const void>(states), grads = pointers<const void>(grad_states_out);
  const auto to = pointers<void>(states_out);
  run(engine, ForwardJob{job, from.data(), to.data(), sizes[15] ? x.data() : nullptr, saved.data(), {}});
  run(engine, BackwardJob{job,
                          grads.data(),
                          saved.data(),
                          {},
                          pointers<float>(grad_states).data(),
                          sizes[15] ? reinterpret_cast<float*>(grad_x.data()) : nullptr,
                          pointers<float>(grad_weights).data(),
                          36u << 20});

  std::FILE* out = std::fopen(argv[5], "wb");
  CHECK(out);
  for (const Bytes& state : states_out) write(out, state);
  for (const Bytes& gradient : grad_states) write(out, gradient);
  write(out, grad_x);
  for (const Bytes& gradient : grad_weights) write(out, gradient);
  CHECK(std::fclose(out) == 0);
}
