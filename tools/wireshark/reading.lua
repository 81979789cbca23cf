-- Field values come from the tables; what can't be declared (which request an answer belongs to,
-- the parts of a graph, the unframed bytes of SPLIT_RUN) is worked out here.

-- TABLES

local proto = Proto("ggml_rpc", "ggml RPC")

-- Larger sizes are no sizes: Lua's numbers are exact to here.
local MOST = 2 ^ 53
local CLIENT, SERVER = "client", "server"
local NAMES = {}
for number, name in pairs(COMMAND_NAMES) do NAMES[name] = number end

-- Fields ------------------------------------------------------------------------------------------

local FIELD = {}

local function declare()
  local types = {}
  for number, entry in pairs(TYPES) do types[number] = entry.name end
  local made = {}
  for _, f in ipairs(FIELDS) do
    local label = f.filter:match("([^.]+)$")
    local values = nil
    if f.filter == "ggml_rpc.command" then values = COMMAND_NAMES end
    if f.filter == "ggml_rpc.tensor.type" then values = types end
    local field
    if f.kind == "bytes" or f.kind == "string" or f.kind == "float" or f.kind == "double" then
      field = ProtoField[f.kind](f.filter, label)
    else
      field = ProtoField[f.kind](f.filter, label, f.hex and base.HEX or base.DEC, values)
    end
    FIELD[f.filter] = field
    made[#made + 1] = field
  end
  local function add(name, field)
    FIELD["ggml_rpc." .. name] = field
    made[#made + 1] = field
  end
  add("kind", ProtoField.string("ggml_rpc.kind", "message"))
  add("number", ProtoField.uint32("ggml_rpc.number", "request number"))
  add("protocol", ProtoField.string("ggml_rpc.protocol", "protocol version"))
  add("answer_in", ProtoField.framenum("ggml_rpc.answer_in", "answer in", base.NONE, frametype.RESPONSE))
  add("request_in", ProtoField.framenum("ggml_rpc.request_in", "request in", base.NONE, frametype.REQUEST))
  add("time", ProtoField.double("ggml_rpc.time", "seconds since the request"))
  add("data", ProtoField.bytes("ggml_rpc.data", "data"))
  add("data_size", ProtoField.uint64("ggml_rpc.data_size", "bytes of data", base.DEC))
  add("step", ProtoField.uint32("ggml_rpc.step", "step"))
  add("tensor.op_name", ProtoField.string("ggml_rpc.tensor.op_name", "op"))
  add("tensor.function", ProtoField.string("ggml_rpc.tensor.function", "function"))
  proto.fields = made
end
declare()

local unreadable = ProtoExpert.new(
  "ggml_rpc.unreadable", "not read as ggml RPC from here on",
  expert.group.MALFORMED, expert.severity.WARN)
proto.experts = {unreadable}

proto.prefs.port = Pref.uint("TCP port", DEFAULT_PORT,
  "Connections to this port are ggml RPC; on others it is recognised by its HELLO.")
proto.prefs.most = Pref.uint("Reassemble data up to (bytes)", 1048576,
  "The data of larger tensors is shown packet by packet.")
proto.prefs.version = Pref.string("Version without HELLO", DIALECTS[1].name,
  "The protocol version of connections whose beginning was not captured.")

local tcp_stream = Field.new("tcp.stream")
local tcp_seq = Field.new("tcp.seq")

-- What is known of each connection ----------------------------------------------------------------

local streams = {}

function proto.init()
  streams = {}
end

local function queue()
  return {first = 1, last = 0}
end

local function push(q, item)
  q.last = q.last + 1
  q[q.last] = item
end

local function front(q)
  return q[q.first]
end

local function pop(q)
  q[q.first] = nil
  q.first = q.first + 1
end

local function new_stream(client)
  return {
    client = client, number = 0,
    -- Dialects the client may speak, likeliest first (they differ in op numbers), and extensions.
    dialects = nil, hello_size = nil, split = false,
    -- Answers that the server owes, and unframed bytes that the client does.
    pending = queue(), inputs = queue(), programs = {},
    -- The SPLIT_JOIN that has made this a link, from where on there are swaps alone.
    join = nil,
    -- By side: the message whose data go on, and whether it can't be read any more.
    open = {}, lost = {},
    -- What was found in each piece that Wireshark handed over.
    calls = {},
  }
end

local function dialect_of_version(version, hello_size)
  local function newest_below(wanted_minor)
    local lowest = nil
    for i, d in ipairs(DIALECTS) do
      local v = d.version
      if v[1] == version[1] and d.hello_size == hello_size
        and (not wanted_minor or v[2] == version[2]) then
        lowest = i
        if v[2] < version[2] or (v[2] == version[2] and v[3] <= version[3]) then return i end
      end
    end
    return wanted_minor and lowest or nil
  end
  return newest_below(true) or newest_below(false)
end

local function dialect_named(name)
  for i, d in ipairs(DIALECTS) do
    if d.name == name then return i end
  end
  return 1
end

local function speak(stream, dialect)
  stream.dialects = {}
  for i, other in ipairs(DIALECTS[dialect].compatible) do stream.dialects[i] = other end
end

local function spec_of(stream, command)
  local spec = COMMANDS[DIALECTS[stream.dialects[1]].commands][command]
  return spec or (stream.split and SPLIT_COMMANDS[command]) or nil
end

-- Newer versions of Lua would write 2.0.
local function whole(number)
  return string.format("%.0f", number)
end

local function u32(tvb, at)
  return tvb(at, 4):le_uint()
end

local function u64(tvb, at)
  return tvb(at, 8):le_uint64():tonumber()
end

local function place(layout, name)
  for _, f in ipairs(LAYOUTS[layout].fields) do
    if f.name == name then return f.at end
  end
end

local TENSOR_SIZE = LAYOUTS.RpcTensor.size
local TENSOR, TENSOR_COUNT = {}, {}
for _, f in ipairs(LAYOUTS.RpcTensor.fields) do TENSOR[f.name], TENSOR_COUNT[f.name] = f.at, f.count end

-- Graphs ------------------------------------------------------------------------------------------

local ZERO_ID = string.rep("\0", 8)

local function count_sources(tvb, at)
  local raw = tvb:raw(at + TENSOR.src, 8 * TENSOR_COUNT.src)
  local n = 0
  for i = 0, TENSOR_COUNT.src - 1 do
    if raw:sub(8 * i + 1, 8 * i + 8) ~= ZERO_ID then n = n + 1 end
  end
  return n
end

-- Where the tensors behind n ids are, into g; nil if their count doesn't fill what goes on to stop,
-- or is more than that where something may follow.
local function read_tensors(tvb, at, n, stop, g, may_follow)
  if at + 8 * n + 4 > stop then return nil end
  at = at + 8 * n
  g.n_tensors, g.tensors = u32(tvb, at), at + 4
  g.tail = g.tensors + TENSOR_SIZE * g.n_tensors
  if g.tail > stop or (g.tail < stop and not may_follow) then return nil end
  return g
end

-- Where the parts of a graph are; nil if its counts don't fill it.
local function read_graph(tvb, at, size, with_device)
  local g = {at = at}
  local stop = at + size
  if with_device then
    if at + 4 > stop then return nil end
    g.device, at = at, at + 4
  end
  if at + 4 > stop then return nil end
  g.n_nodes, g.nodes = u32(tvb, at), at + 4
  return read_tensors(tvb, g.nodes, g.n_nodes, stop, g)
end

local function read_program(tvb, at, size)
  local g = {at = at, steps = {}}
  local stop = at + size
  local step_size = LAYOUTS.SplitStep.size
  if at + 4 > stop then return nil end
  g.n_steps, g.first_step, at = u32(tvb, at), at + 4, at + 4
  if at + step_size * g.n_steps > stop then return nil end
  g.n_ids, g.n_nodes = 0, 0
  for i = 1, g.n_steps do
    local step = {}
    for _, f in ipairs(LAYOUTS.SplitStep.fields) do
      step[f.name] = u32(tvb, at + f.at)
      g.n_ids = g.n_ids + step[f.name]
    end
    g.n_nodes = g.n_nodes + step.n_nodes
    g.steps[i] = step
    at = at + step_size
  end
  g.ids = at
  if not read_tensors(tvb, at, g.n_ids, stop, g, true) then return nil end
  if g.tail < stop then
    if g.tail + 8 > stop then return nil end
    g.n_swaps, g.n_parts = u32(tvb, g.tail), u32(tvb, g.tail + 4)
    if 8 + g.n_swaps * (4 + 8 * g.n_parts) ~= stop - g.tail then return nil end
  end
  return g
end

local function fits(stream_dialect, graph, tvb)
  local d = DIALECTS[stream_dialect]
  local ops, sources = OPS[d.ops], SOURCES[d.ops]
  for i = 0, graph.n_tensors - 1 do
    local at = graph.tensors + TENSOR_SIZE * i
    local op = u32(tvb, at + TENSOR.op)
    if not ops[op] then return false end
    local limits = sources[op]
    if limits then
      local n = count_sources(tvb, at)
      if n < limits[1] or n > limits[2] then return false end
    end
  end
  return true
end

-- Whether the graph has ops that are numbered differently by versions.
local function tells(graph, tvb)
  for i = 0, graph.n_tensors - 1 do
    local op = u32(tvb, graph.tensors + TENSOR_SIZE * i + TENSOR.op)
    for _, ops in ipairs(OPS) do
      if ops[op] ~= OPS[1][op] then return true end
    end
  end
  return false
end

local function nbytes(tvb, at)
  local entry = TYPES[u32(tvb, at + TENSOR.type)]
  if not entry then return nil end
  local ne, nb = {}, {}
  for i = 0, 3 do
    ne[i] = u32(tvb, at + TENSOR.ne + 4 * i)
    nb[i] = u32(tvb, at + TENSOR.nb + 4 * i)
    if ne[i] == 0 then return 0 end
  end
  local size
  if entry.block == 1 then
    size = entry.size + (ne[0] - 1) * nb[0]
  else
    size = math.floor(ne[0] * nb[0] / entry.block)
  end
  for i = 1, 3 do size = size + (ne[i] - 1) * nb[i] end
  return size
end

-- Bytes that each step of a program takes off the stream and puts on it; nil if unknown.
local function step_sizes(program, tvb)
  local sizes = {}
  for i = 0, program.n_tensors - 1 do
    local at = program.tensors + TENSOR_SIZE * i
    sizes[tvb:raw(at, 8)] = nbytes(tvb, at)
  end
  local at, made = program.ids, {}
  -- Outputs of a program with swaps have their sizes before them.
  local frame = program.n_swaps and 8 or 0
  for i, step in ipairs(program.steps) do
    local taken, given = 0, 0
    for n = 1, step.n_inputs do
      local size = sizes[tvb:raw(at, 8)]
      if not size then return nil end
      taken, at = taken + size, at + 8
    end
    at = at + 8 * step.n_nodes
    for n = 1, step.n_outputs do
      local size = sizes[tvb:raw(at, 8)]
      if not size then return nil end
      given, at = given + size + frame, at + 8
    end
    made[i] = {taken = taken, given = given}
  end
  made.swaps = program.n_swaps ~= nil
  return made
end

-- Reading a stream: once, in the order of its bytes ----------------------------------------------

local function lose(stream, side, why)
  stream.lost[side] = why
end

local function settle_numbering(stream, message, tvb)
  if #stream.dialects < 2 or not tells(message.graph, tvb) then return end
  local left = {}
  for _, candidate in ipairs(stream.dialects) do
    if fits(candidate, message.graph, tvb) then left[#left + 1] = candidate end
  end
  if #left > 0 then stream.dialects = left end
  message.dialect = stream.dialects[1]
end

local function program_key(message)
  return message.device .. ":" .. message.program
end

local function requested(stream, message, tvb)
  local spec = message.spec
  local payload = message.at + LAYOUTS.RequestFrame.size
  if spec.body == "graph" and message.command ~= NAMES.SPLIT_PROGRAM then
    message.graph = read_graph(
      tvb, message.body, message.body_size, DIALECTS[message.dialect].graph_device)
    if message.graph then settle_numbering(stream, message, tvb) end
  elseif message.command == NAMES.SPLIT_PROGRAM then
    message.graph = read_program(tvb, message.body, message.body_size)
    message.device = u32(tvb, payload + place(spec.request, "device"))
    message.program = u32(tvb, payload + place(spec.request, "program"))
    if message.graph then
      stream.programs[program_key(message)] = step_sizes(message.graph, tvb)
    end
  end
  if spec.answer == "fixed" then
    push(stream.pending, {request = message, size = LAYOUTS[spec.response].size})
  elseif spec.answer == "data" then
    local size = u64(tvb, payload + place(spec.request, "size"))
    push(stream.pending, {request = message, size = size})
  end
  if message.command == NAMES.SPLIT_RUN then
    message.device = u32(tvb, payload + place(spec.request, "device"))
    message.program = u32(tvb, payload + place(spec.request, "program"))
    local steps = stream.programs[program_key(message)]
    if not steps then
      lose(stream, CLIENT, "the steps of this program were not seen")
      return
    end
    for i, step in ipairs(steps) do
      if step.taken > 0 then
        push(stream.inputs, {request = message, size = step.taken, step = i, raw = true})
      end
      if step.given > 0 then
        push(stream.pending, {
          request = message, size = step.given, step = i, raw = true,
          may_report = steps.swaps,
        })
      end
    end
  end
end

local function caps_version(tvb, at, size)
  local magic = tvb(at, size):bytes():tohex(true)
  if magic:sub(1, #SPLIT_MAGIC) ~= SPLIT_MAGIC then return 0 end
  return tvb(at + #SPLIT_MAGIC / 2, 1):uint()
end

local function agreed(stream, message, tvb)
  local at = message.at + LAYOUTS.AnswerFrame.size
  local version = {}
  for i, name in ipairs({"major", "minor", "patch"}) do
    version[i] = tvb(at + place(message.spec.response, name), 1):uint()
  end
  local dialect = dialect_of_version(version, stream.hello_size)
  if not dialect then
    local why = "the server speaks a protocol version that is not known here"
    lose(stream, CLIENT, why)
    lose(stream, SERVER, why)
    return
  end
  speak(stream, dialect)
  message.dialect = dialect
  if stream.hello_size > 0 and stream.hello_split then
    local caps = at + place(message.spec.response, "conn_caps")
    stream.split = caps_version(tvb, caps, stream.hello_size) > 0
  end
end

-- The first request of a stream; returns its spec.
local function first_request(stream, tvb, at, command, size)
  if command == NAMES.HELLO then
    for i, d in ipairs(DIALECTS) do
      if d.hello_size == size then
        stream.hello_size = size
        speak(stream, i)
        return COMMANDS[d.commands][command]
      end
    end
    return nil
  end
  speak(stream, dialect_named(proto.prefs.version))
  return spec_of(stream, command)
end

-- Each reader returns a message, or nil and how many bytes are missing (0: it isn't known).

local function next_request(stream, tvb, at)
  local have = tvb:len() - at
  local frame = LAYOUTS.RequestFrame.size
  if have < frame then return nil, 0 end
  local command, size = tvb(at, 1):uint(), u64(tvb, at + 1)
  local spec
  if not stream.dialects then
    spec = first_request(stream, tvb, at, command, size)
  else
    spec = spec_of(stream, command)
  end
  local head = spec and LAYOUTS[spec.request].size
  if not spec or size > MOST or size < head or (spec.body == "none" and size ~= head) then
    lose(stream, CLIENT, string.format("%s of %.0f bytes is no request of protocol %s",
      COMMAND_NAMES[command] or ("command " .. whole(command)), size,
      stream.dialects and DIALECTS[stream.dialects[1]].name or "1.0 to 7.0"))
    return nil, nil
  end
  local message = {
    kind = "request", command = command, spec = spec, at = at, number = stream.number,
    dialect = stream.dialects[1], head = frame + head, body = at + frame + head,
    body_size = size - head, total = frame + size,
  }
  local wanted = message.total
  if spec.body == "data" and message.body_size > proto.prefs.most then wanted = message.head end
  if have < wanted then return nil, wanted - have end
  stream.number = stream.number + 1
  message.seen = math.min(have, message.total)
  if command == NAMES.HELLO and size > 0 then
    stream.hello_split = caps_version(tvb, at + frame, size) > 0
  end
  requested(stream, message, tvb)
  return message
end

local function unframed(stream, tvb, at, expected, kind)
  local have = tvb:len() - at
  local size = expected.size
  if expected.may_report then
    -- A size with this mark is that of a text which says why there are no outputs.
    if have < 8 then return nil, 8 - have end
    if u32(tvb, at + 4) == REPORT_MARK and u32(tvb, at) <= MOST_REPORT then
      size = 8 + u32(tvb, at)
      while stream.pending.last > stream.pending.first
        and stream.pending[stream.pending.last].request == expected.request do
        stream.pending[stream.pending.last] = nil
        stream.pending.last = stream.pending.last - 1
      end
    end
  end
  local wanted = size
  if wanted > proto.prefs.most then wanted = 1 end
  if have < wanted then return nil, wanted - have end
  return {
    kind = kind, command = expected.request.command, spec = expected.request.spec, at = at,
    number = expected.request.number, dialect = expected.request.dialect, head = 0, body = at,
    body_size = size, total = size, seen = math.min(have, size),
    request = expected.request, step = expected.step,
  }
end

-- What a piece of a link has: nothing on it says what belongs together.
local function swaps(stream, tvb, at)
  local join, size = stream.join, tvb:len() - at
  return {
    kind = "swaps", command = join.command, spec = join.spec, at = at, number = join.number,
    dialect = join.dialect, head = 0, body = at, body_size = size, total = size, seen = size,
    request = join,
  }
end

local function next_answer(stream, tvb, at)
  local have = tvb:len() - at
  local expected = front(stream.pending)
  if not expected then
    lose(stream, SERVER, "bytes that answer no request")
    return nil, nil
  end
  if expected.raw then
    local message, missing = unframed(stream, tvb, at, expected, "outputs")
    if message then pop(stream.pending) end
    return message, missing
  end
  local frame = LAYOUTS.AnswerFrame.size
  if have < frame then return nil, 0 end
  local size = u64(tvb, at)
  local request = expected.request
  if size ~= expected.size then
    lose(stream, SERVER, string.format("the answer to %s has %.0f bytes, not %.0f",
      COMMAND_NAMES[request.command], size, expected.size))
    return nil, nil
  end
  local data = request.spec.answer == "data"
  local message = {
    kind = "answer", command = request.command, spec = request.spec, at = at,
    number = request.number, dialect = request.dialect, head = data and frame or frame + size,
    body = at + frame, body_size = data and size or 0, total = frame + size, request = request,
  }
  local wanted = message.total
  if data and size > proto.prefs.most then wanted = frame end
  if have < wanted then return nil, wanted - have end
  message.seen = math.min(have, message.total)
  pop(stream.pending)
  if request.command == NAMES.HELLO then
    agreed(stream, message, tvb)
    request.dialect = message.dialect
  elseif request.command == NAMES.SPLIT_JOIN then
    local result = place(request.spec.response, "result")
    if tvb(message.at + frame + result, 1):uint() > 0 then stream.join = request end
  end
  return message
end

local function next_message(stream, side, tvb, at)
  if stream.join then return swaps(stream, tvb, at) end
  if side == SERVER then return next_answer(stream, tvb, at) end
  local expected = front(stream.inputs)
  if expected then
    local message, missing = unframed(stream, tvb, at, expected, "inputs")
    if message then pop(stream.inputs) end
    return message, missing
  end
  return next_request(stream, tvb, at)
end

local function ended(message, frame, time)
  message.ended_in, message.ended_at = frame, time
  local request = message.request
  if request then
    request.answer_in = request.answer_in or frame
    if request.ended_at and message.kind ~= "swaps" then message.time = time - request.ended_at end
  end
end

-- All that is in one piece of the stream: {messages, parts of messages' data}, bytes missing.
local function read(stream, side, tvb, frame, time)
  local found = {messages = {}}
  local at, length = 0, tvb:len()
  while at < length and not stream.lost[side] do
    local open = stream.open[side]
    if open then
      local n = math.min(open.left, length - at)
      found.messages[#found.messages + 1] =
        {more = true, of = open.message, at = at, size = n, from = open.message.body_size - open.left}
      open.left = open.left - n
      at = at + n
      if open.left == 0 then
        stream.open[side] = nil
        ended(open.message, frame, time)
      end
    else
      local message, missing = next_message(stream, side, tvb, at)
      if not message then
        found.missing = missing
        break
      end
      message.frame = frame
      found.messages[#found.messages + 1] = message
      at = at + message.seen
      if message.seen < message.total then
        stream.open[side] = {message = message, left = message.total - message.seen}
      else
        ended(message, frame, time)
      end
    end
  end
  found.read = at
  found.lost = at < length and stream.lost[side] or nil
  return found
end
