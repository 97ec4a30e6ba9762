// Threads for the operators: one pool per process, its caller works along.
#pragma once
#include <cstdint>
#include <functional>

namespace kimi {

// Calls work(unit) for every unit in [0, units), each once, spread over the pool; returns when all are done. Which
// thread takes which unit is open, so a result must not depend on it. Calls from several threads wait
// for each other; work must not call it again.
void parallel(int64_t units, const std::function<void(int64_t unit)> &work);

// Threads that share the work, the caller included: at first the cores of the affinity mask. What the user or a container
// asks for is not read here, because MindSpore writes an OMP_NUM_THREADS of its own into the environment.
int threads();
void set_threads(int count);

}  // namespace kimi
