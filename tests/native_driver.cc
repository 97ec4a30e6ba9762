// Runs operators of a library where there is no Python, such as under an emulator: calls come in on stdin, what they give
// goes to stdout. `native_driver LIBRARY ISA THREADS`, ISA as for kimi_set_isa or "best"; status 2: bad input, 3: no such ISA.
//
// A call is a line "name inputs outputs", a line "dtype rank dims..." for each of both, and the inputs' bytes. The answer
// is a line with the status, and the outputs' bytes.
#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

using Operator = int (*)(int, void **, int *, int64_t **, const char **, void *, void *);

struct Tensor {
  std::string dtype;
  std::vector<int64_t> shape;
  std::vector<char> bytes;

  explicit Tensor(const std::string &line) {
    std::istringstream words(line);
    size_t rank = 0, size = 0;
    words >> dtype >> rank;
    shape.resize(rank);
    size = dtype == "bfloat16" ? 2 : 4;
    for (int64_t &dim : shape) {
      words >> dim;
      size *= size_t(dim);
    }
    bytes.resize(size);
  }
};

int main(int argc, char **argv) {
  if (argc != 4) {
    std::cerr << "usage: native_driver LIBRARY ISA THREADS\n";
    return 2;
  }
  void *library = dlopen(argv[1], RTLD_NOW);
  if (!library) {
    std::cerr << dlerror() << '\n';
    return 2;
  }
  const std::string isa = argv[2];
  const auto set_isa = reinterpret_cast<int (*)(const char *)>(dlsym(library, "kimi_set_isa"));
  if (isa != "best" && !set_isa(isa.c_str())) return 3;
  reinterpret_cast<void (*)(int)>(dlsym(library, "kimi_set_threads"))(std::atoi(argv[3]));
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string name;
    size_t inputs = 0, outputs = 0;
    words >> name >> inputs >> outputs;
    auto run = reinterpret_cast<Operator>(dlsym(library, ("kimi_" + name).c_str()));
    if (!run) {
      std::cerr << "no operator " << name << '\n';
      return 2;
    }
    std::vector<Tensor> tensors;
    while (tensors.size() < inputs + outputs && std::getline(std::cin, line)) tensors.emplace_back(line);
    std::vector<void *> data;
    std::vector<int> ranks;
    std::vector<int64_t *> shapes;
    std::vector<const char *> dtypes;
    for (size_t i = 0; i < tensors.size(); ++i) {
      Tensor &t = tensors[i];
      if (i < inputs) std::cin.read(t.bytes.data(), std::streamsize(t.bytes.size()));
      data.push_back(t.bytes.data());
      ranks.push_back(int(t.shape.size()));
      shapes.push_back(t.shape.data());
      dtypes.push_back(t.dtype.c_str());
    }
    std::cout << run(int(data.size()), data.data(), ranks.data(), shapes.data(), dtypes.data(), nullptr, nullptr) << '\n';
    for (size_t i = inputs; i < tensors.size(); ++i)
      std::cout.write(tensors[i].bytes.data(), std::streamsize(tensors[i].bytes.size()));
  }
}
